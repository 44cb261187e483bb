"""Attention over a KV cache in PyTorch, for machines and shapes that the kernels do not serve.

It computes (1) to (5) of `parallax.reference`. Sums and statistics are at least fp32; the largest buffers are
the scores `[B, H, T, S]`.
"""

import torch
from torch import Tensor

from parallax.eager import accumulation_dtype


def gather_pages(cache: Tensor, page_table: Tensor) -> Tensor:
    """Gather the pages of a paged KV cache into a contiguous one.

    Args:
        cache: Pages `[P, page size, G, K]`.
        page_table: Pages of each sequence `[B, pages]` int32.

    Returns:
        `[B, pages * page size, G, K]`.
    """
    return cache[page_table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)


@torch.no_grad()
def decode(
    q_BTHK: Tensor,
    r_BTHK: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    window_size: int | None,
    scale: float,
    out_BTHK: Tensor,
) -> None:
    """Compute attention of new tokens over a KV cache.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, bf16/fp16/fp32/fp64.
        r_BTHK: Probes `[B, T, H, K]`, or None for softmax attention.
        k_cache: Keys `[B, S, G, K]`, or pages `[P, page size, G, K]`.
        v_cache: Values, as the keys.
        cache_seqlens: Keys of each sequence `[B]` int32, the new tokens' included.
        page_table: Pages of each sequence `[B, pages]` int32, or None.
        window_size: Newest keys that a query sees, its own included; None for all.
        scale: Factor of q.k.
        out_BTHK: Output `[B, T, H, K]` to write to.
    """
    dtype = accumulation_dtype(q_BTHK.dtype)
    k_BSGK, v_BSGK = (x if page_table is None else gather_pages(x, page_table) for x in (k_cache, v_cache))
    num_tokens, num_keys, num_kv_heads = q_BTHK.shape[1], k_BSGK.shape[1], k_BSGK.shape[2]
    o_key = torch.arange(num_keys, device=q_BTHK.device)
    exists_BS = o_key < cache_seqlens[:, None]
    # past the keys the cache may hold anything, even NaN
    k_BSGK, v_BSGK = (torch.where(exists_BS[..., None, None], x, 0).to(dtype) for x in (k_BSGK, v_BSGK))
    last_BT1 = (cache_seqlens[:, None] - num_tokens + torch.arange(num_tokens, device=q_BTHK.device))[
        ..., None
    ]
    visible_BTS = o_key <= last_BT1
    if window_size is not None:
        visible_BTS &= o_key > last_BT1 - window_size
    visible_B11TS = visible_BTS[:, None, None]

    def scores(x_BTHK: Tensor) -> Tensor:
        x_BTGhK = x_BTHK.to(dtype).unflatten(2, (num_kv_heads, -1))
        return torch.einsum("btghk,bsgk->bghts", x_BTGhK, k_BSGK)

    s = (scores(q_BTHK) * scale).masked_fill(~visible_B11TS, float("-inf"))
    # the output of a row without visible keys is zero
    w = torch.softmax(s, -1).masked_fill(~visible_B11TS, 0.0)
    if r_BTHK is not None:
        t = scores(r_BTHK)
        w = w * (1.0 + (w * t).sum(-1, keepdim=True) - t)
    o_BTGhK = torch.einsum("bghts,bsgk->btghk", w, v_BSGK)
    out_BTHK.copy_(o_BTGhK.flatten(2, 3))
