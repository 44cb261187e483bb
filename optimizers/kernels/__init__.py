"""Triton kernels of Muon, each with its PyTorch equivalent for the CPU."""
