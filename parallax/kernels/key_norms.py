"""Largest key norm per head: it bounds the scores of (1) of `parallax.reference`, by |q.k| <= |q| |k|."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallax.kernels.addressing import load_tile, strides_of

_ROWS = 128


@triton.jit(do_not_specialize=["T"])
def _largest_key_norms_kernel(
    k, norms, strides, T, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr
):
    """Update a head's largest squared norm by BS keys; one program each."""
    num_tiles = tl.cdiv(T, BS)
    i_bg = tl.program_id(0) // num_tiles
    i_s = tl.program_id(0) % num_tiles * BS
    b_k = load_tile(k, strides, i_bg // G, i_bg % G, i_s, T, BS, BK, K, False).to(tl.float32)
    tl.atomic_max(norms + i_bg, tl.max(tl.sum(b_k * b_k, 1), 0), sem="relaxed")


def largest_key_norms(k: Tensor) -> Tensor:
    """Compute the largest squared norm of each head's keys; bit-identical from run to run.

    Args:
        k: Keys `[B, T, G, K]`, their last dimension contiguous.

    Returns:
        `[B, G]` fp32.
    """
    batch_size, num_tokens, num_kv_heads, head_dim = k.shape
    norms = torch.zeros(batch_size, num_kv_heads, dtype=torch.float32, device=k.device)
    _largest_key_norms_kernel[(triton.cdiv(num_tokens, _ROWS) * batch_size * num_kv_heads,)](
        k, norms, strides_of(k), num_tokens,
        G=num_kv_heads, K=head_dim, BK=triton.next_power_of_2(head_dim), BS=_ROWS,
    )  # fmt: skip
    return norms
