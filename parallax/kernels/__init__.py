"""Triton kernels of Parallax attention."""
