"""Evaluation: held-out loss, loss on text, downstream tasks, and the report that compares runs."""
