"""Training: the trainer on top of torchtitan, its config, metrics, checkpoints and evaluation."""
