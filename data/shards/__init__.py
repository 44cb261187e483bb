"""Prepare shards: tokenize text once and write it to disk. `python -m data.shards` is the command line."""
