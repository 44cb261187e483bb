"""Faults injected into real runs: what a run says and keeps, and that it then goes on as if nothing had been.

The short forms are part of `make test`; `make test-faults` runs all, the slow ones too, and prints a table
of what was injected for docs/training.md.
"""
