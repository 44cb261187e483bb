"""Reading checkpoints, and checking every byte of them; `python -m models.checkpoint verify` is the command."""
