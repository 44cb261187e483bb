"""Plans: comparisons of many runs as one command; `python -m training.sweep` runs them."""
