"""Text generation with a trained model; `python -m models.generation` is the command."""
