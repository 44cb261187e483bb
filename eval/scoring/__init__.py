"""Log-probabilities of continuations from a model, batched."""
