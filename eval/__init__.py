"""Evaluation of a model: perplexity on held-out text."""
