"""Benchmarks: each prints a table and writes its raw results to benchmarks/results/."""
