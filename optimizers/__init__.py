"""Optimizers of a run: Muon for hidden matrices, AdamW for the other parameters, and their schedule."""
