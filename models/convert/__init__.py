"""Hugging Face checkpoints in and out; `python -m models.convert` is the command."""
