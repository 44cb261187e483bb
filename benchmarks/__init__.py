"""Benchmarks: each prints a table and writes its raw result to benchmarks/results/."""
