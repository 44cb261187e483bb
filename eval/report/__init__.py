"""Comparison of runs; `python -m eval.report` writes it."""
