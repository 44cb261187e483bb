"""Conversion from and to Hugging Face checkpoints; `python -m models.convert` is the command."""
