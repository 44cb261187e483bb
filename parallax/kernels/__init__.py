"""Triton and Gluon kernels of Parallax and softmax attention, for training and for decoding."""
