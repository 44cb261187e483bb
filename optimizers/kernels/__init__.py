"""Triton kernels of Muon, each beside the torch functions that take its place without a GPU."""
