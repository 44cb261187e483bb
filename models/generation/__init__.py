"""Text from a trained model; `python -m models.generation` is the command."""
