"""Optimizers of a run: Muon for hidden matrices, AdamW for the rest, and their learning-rate schedule."""
