"""Plans: comparisons of many runs as one command; `python -m training.sweep` works them off."""
