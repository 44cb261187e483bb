"""Checkpoints, read with every byte checked; `python -m models.checkpoint verify` is the command."""
