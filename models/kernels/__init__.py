"""Triton kernels of the model beside those of attention; their callers have the same in PyTorch."""
