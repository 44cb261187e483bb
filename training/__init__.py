"""The training run: torchtitan's trainer with our parts, metrics and signals."""
