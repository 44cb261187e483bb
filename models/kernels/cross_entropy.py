"""Cross-entropy of logits, whose gradient replaces them: one Triton program per token.

A program reads its row of logits twice, first for the log-sum-exp, then, last columns first, for the gradient
that it writes in their place. A row of 151,936 16-bit logits is 297 KiB, so those of all programs that run at
a time nearly fit the L2 cache of an H100 or H200, and memory is read and written about once.

With l the logits, y the label and z the coefficient of the z-loss (models/loss.py):

    lse = log sum_v exp l_v,  loss = lse - l_y,  z-loss = z lse^2,
    d(loss + z-loss) / dl_v = exp(l_v - lse) (1 + 2 z lse) - [v = y]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokens import IGNORE_INDEX

DTYPES = (torch.bfloat16, torch.float16)
"""Supported dtypes of logits."""

_BLOCK = 32768
"""Columns of a tile, measured (benchmarks/results/memory_passes_h200_202611.json)."""

_NUM_WARPS = 32
"""Warps of a program: as many as there may be, so that few rows compete for the L2 cache."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)
"""Below any logit, and finite, so that the difference of two is not NaN."""


@triton.jit
def _load_tile(p_row, i_v, o_v, V):
    """Load the tile of logits [BV / 8, 8] that starts at column i_v, -inf where there is none."""
    m_v = (i_v + o_v < V) & (i_v >= 0)
    return tl.load(p_row + i_v + o_v, mask=m_v, other=-float("inf"))


@triton.jit
def _add_tile(b_l, b_max, b_sum):
    """Add a tile of logits to the running maxima and sums of exponentials, [BV / 8] each."""
    b_l = b_l.to(tl.float32)
    b_new = tl.maximum(b_max, tl.max(b_l, 1))
    # the difference first: a fused product and sum of two _LOWEST would not be 0
    b_sum *= tl.exp2((b_max - b_new) * _LOG2_E)
    b_shift = b_new * _LOG2_E
    return b_new, b_sum + tl.sum(tl.exp2(b_l * _LOG2_E - b_shift[:, None]), 1)


@triton.jit(do_not_specialize=["z_loss"])
def cross_entropy_kernel(
    logits, labels, losses, z_loss, V,
    IGNORED: tl.constexpr, NEEDS_GRAD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute loss and z-loss of one token, and replace its logits by their gradient."""
    i_t = tl.program_id(0).to(tl.int64)
    p_row = logits + i_t * V
    # eight columns a thread: their maximum is found, and its exponential computed, once for all
    o_v = tl.arange(0, BV // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    label = tl.load(labels + i_t)
    if label == IGNORED:
        tl.store(losses + 2 * i_t, 0.0)
        tl.store(losses + 2 * i_t + 1, 0.0)
        if NEEDS_GRAD:
            b_zero = tl.zeros([BV // 8, 8], p_row.dtype.element_ty)
            for i_v in range(0, V, BV):
                tl.store(p_row + i_v + o_v, b_zero, mask=i_v + o_v < V)
    else:
        is_column = (label >= 0) & (label < V)
        target = tl.load(p_row + label, mask=is_column, other=float("nan")).to(tl.float32)
        b_max = tl.full([BV // 8], _LOWEST, tl.float32)
        b_sum = tl.zeros([BV // 8], tl.float32)
        # the next tile is loaded while this one is added
        b_next = _load_tile(p_row, 0, o_v, V)
        for i_v in range(0, V, BV):
            b_l = b_next
            b_next = _load_tile(p_row, i_v + BV, o_v, V)
            b_max, b_sum = _add_tile(b_l, b_max, b_sum)
        largest = tl.max(b_max, 0)
        b_sum *= tl.exp2((b_max - largest) * _LOG2_E)
        lse = largest + tl.log(tl.sum(b_sum, 0))
        tl.store(losses + 2 * i_t, lse - target)
        tl.store(losses + 2 * i_t + 1, z_loss * lse * lse)
        if NEEDS_GRAD:
            # no thread writes before all have read the target's logit
            tl.debug_barrier()
            shift, factor = lse * _LOG2_E, 1.0 + 2.0 * z_loss * lse
            column = tl.where(is_column, label, -1).to(tl.int32)
            i_last = (V - 1) // BV * BV
            b_next = _load_tile(p_row, i_last, o_v, V)
            for i_back in range(0, V, BV):
                b_l = b_next.to(tl.float32)
                i_v = i_last - i_back
                b_next = _load_tile(p_row, i_v - BV, o_v, V)
                b_grad = tl.exp2(b_l * _LOG2_E - shift) * factor
                b_grad = tl.where(i_v + o_v == column, b_grad - 1.0, b_grad)
                tl.store(p_row + i_v + o_v, b_grad.to(p_row.dtype.element_ty), mask=i_v + o_v < V)


def serves(logits: Tensor) -> bool:
    """Return whether the kernel serves logits: on a GPU, of DTYPES."""
    return logits.is_cuda and logits.dtype in DTYPES


def cross_entropy_(logits: Tensor, labels: Tensor, z_loss: float, *, needs_grad: bool) -> Tensor:
    """Compute losses of tokens, and replace the logits by the gradient of the losses' sum.

    Args:
        logits: `[T, V]`, of DTYPES, contiguous; unchanged without needs_grad.
        labels: `[T]`, int64; tokens.IGNORE_INDEX is skipped, with a gradient of 0.
        z_loss: Coefficient of the z-loss.
        needs_grad: Whether to compute the gradient.

    Returns:
        Cross-entropy and z-loss of each token, in nats, fp32 `[T, 2]`; NaN for a label that is neither a
        column nor IGNORE_INDEX.
    """
    num_tokens, num_columns = logits.shape
    losses = torch.empty(num_tokens, 2, dtype=torch.float32, device=logits.device)
    assert logits.is_contiguous()
    if num_tokens:
        block = max(8, min(_BLOCK, int(triton.next_power_of_2(num_columns))))
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(num_tokens,)](
                logits, labels.contiguous(), losses, z_loss, num_columns,
                IGNORED=IGNORE_INDEX, NEEDS_GRAD=needs_grad, BV=block,
                num_warps=max(4, min(_NUM_WARPS, block // 512)),
            )  # fmt: skip
    return losses
