"""What the Hopper kernels share: warps that take different parts, in Gluon.

A program has one warp that copies tiles into a ring in shared memory, and two warpgroups that multiply. A
stage of the ring is `full` when its copies have arrived and `empty` when both warpgroups have let it go;
the n-th use of a barrier is waited for by n's parity.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from parallax.kernels.addressing import row_strides

ROWS = tl.constexpr(64)
"""Rows of a warpgroup; a program has twice as many."""

CONSUMER_REGISTERS = tl.constexpr(240)
"""Registers of a thread that multiplies; with those below, all that a multiprocessor has."""

PRODUCER_REGISTERS = tl.constexpr(24)
"""Registers of a thread that copies."""

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def describe(x: Tensor, num_rows: int, block_k: int) -> TensorDescriptor:
    """Return the descriptor that copies `num_rows` rows of one head of `[B, T, H, K]`, 16 bits a number."""
    batch_size, num_tokens, num_heads, head_dim = x.shape
    layout = gl.NVMMASharedLayout.get_default_for([num_rows, block_k], _DTYPES[x.dtype])
    stride_b, stride_h, stride_t = row_strides(x)
    shape, strides = [batch_size, num_heads, num_tokens, head_dim], [stride_b, stride_h, stride_t, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, num_rows, block_k], layout)
