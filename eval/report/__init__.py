"""Tables and plots of runs; `python -m eval.report` is the command."""
