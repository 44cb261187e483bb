"""Addition of a 16-bit gradient to an fp32 sum, one Triton program per block of elements.

PyTorch's addition of two dtypes reads and writes element by element: 2.0 TB/s on an H200, where a copy
reaches 4.3 (benchmarks/results/step_traces_h200_202611.json).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
"""Supported dtypes of gradients."""

_BLOCK = 2048
"""Elements of a program."""


@triton.jit
def accumulate_kernel(total, x, N, BLOCK: tl.constexpr):
    """Add a block of x `[N]` to the total `[N]`."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_x = tl.load(x + o_n, mask=m_n).to(tl.float32)
    tl.store(total + o_n, tl.load(total + o_n, mask=m_n) + b_x, mask=m_n)


def serves(total: Tensor, x: Tensor) -> bool:
    """Return whether the kernel adds x to the total: on a GPU, fp32 and of DTYPES, both contiguous."""
    return (
        x.is_cuda
        and total.device == x.device
        and total.dtype == torch.float32
        and x.dtype in DTYPES
        and total.is_contiguous()
        and x.is_contiguous()
    )


def accumulate_(total: Tensor, x: Tensor) -> None:
    """Add x to the total, as total.add_(x) does, bit by bit.

    Args:
        total: fp32, of any shape; replaced by the sum.
        x: Of the same shape.
    """
    assert total.shape == x.shape
    if not serves(total, x):
        total.add_(x)
    elif x.numel():
        with torch.cuda.device_of(x):
            accumulate_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
                total, x, x.numel(), BLOCK=_BLOCK, num_warps=4
            )
