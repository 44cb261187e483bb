"""Prepared shards: text tokenized once and written to disk; `python -m data.shards` is the command."""
