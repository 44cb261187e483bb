"""Batched log-likelihoods and greedy continuations from a language model."""
