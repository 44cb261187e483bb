"""The attention of an exported Parallax model: eager, or by this project's kernels where they are installed.

Copied to an export beside modeling_parallax.py, which has the formula and the letters. Of tensors alone; it
imports only torch, and the project's package `parallax` if it is there.
"""

from collections.abc import Callable

import torch

parallax_attention: Callable[..., torch.Tensor] | None
parallax_decode: Callable[..., torch.Tensor] | None
try:
    # another package of that name lacks these functions
    from parallax import parallax_attention, parallax_decode
except ImportError:
    parallax_attention = parallax_decode = None

_QUERY_BLOCK = 128
_KERNEL_DEVICES = ("cuda",)


def has_kernels(device: torch.device) -> bool:
    """Return whether the project's kernels are installed and made for this device."""
    return device.type in _KERNEL_DEVICES and parallax_attention is not None


def _attend(
    q_BGRTK: torch.Tensor,
    r_BGRTK: torch.Tensor | None,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    mask_BGRTS: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the formula above for a block of queries, R per key/value head; without r softmax attention."""
    shape = q_BGRTK.shape
    k, v = k_BGSK.to(q_BGRTK.dtype), v_BGSK.to(q_BGRTK.dtype)

    def scores(x_BGRTK: torch.Tensor) -> torch.Tensor:
        return (x_BGRTK.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, shape[2:4])

    logits = scores(q_BGRTK) * shape[-1] ** -0.5
    if mask_BGRTS is not None and mask_BGRTS.dtype == torch.bool:
        # not -inf: a padding query sees no key, and its softmax must not be NaN
        logits = logits.masked_fill(~mask_BGRTS, torch.finfo(logits.dtype).min)
    elif mask_BGRTS is not None:
        logits = logits + mask_BGRTS
    weights = logits.softmax(dim=-1)
    if r_BGRTK is not None:
        t = scores(r_BGRTK)
        weights = weights * (1 + (weights * t).sum(dim=-1, keepdim=True) - t)
    return (weights.flatten(2, 3) @ v).unflatten(2, shape[2:4])


def eager_attention(
    q_BHTK: torch.Tensor,
    r_BHTK: torch.Tensor | None,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Compute attention of T queries, `[B, H, T, K]`, in blocks of queries.

    Args:
        q_BHTK: Queries.
        r_BHTK: Probes; None for softmax attention.
        k_BGSK: Keys, those of the cache included.
        v_BGSK: Values.
        mask: True for visible keys, or what is added to the scores, `[B, 1 or H, T, S]`. None as in
            transformers: one query sees all keys, query t of several those up to t.
    """
    num_heads, num_tokens = q_BHTK.shape[1:3]
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    groups = (k_BGSK.shape[1], -1)
    is_causal = mask is None and num_tokens > 1
    blocks = []
    for start in range(0, num_tokens, _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        q = q_BHTK[:, :, rows].to(wide).unflatten(1, groups)
        r = None if r_BHTK is None else r_BHTK[:, :, rows].to(wide).unflatten(1, groups)
        keys = slice(min(start + _QUERY_BLOCK, num_tokens) if is_causal else None)
        k, v = k_BGSK[:, :, keys], v_BGSK[:, :, keys]
        visible = None
        if is_causal:
            slots = torch.arange(k.shape[2], device=k.device)
            visible = slots[rows, None] >= slots
        elif mask is not None:
            visible = mask[:, :, rows].expand(-1, num_heads, -1, -1).unflatten(1, groups)
        blocks.append(_attend(q, r, k, v, visible).flatten(1, 2).to(q_BHTK.dtype))
    return torch.cat(blocks, dim=2)


def kernel_attention(
    q_BHTK: torch.Tensor,
    r_BHTK: torch.Tensor | None,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    window_size: int | None,
    bounds: torch.Tensor | None,
) -> torch.Tensor:
    """Compute attention without a mask by the project's kernels, `[B, H, T, K]`.

    Args:
        q_BHTK: Queries: all tokens of a row, or the newest one.
        r_BHTK: Probes; None for softmax attention.
        k_BGSK: Keys, of which the newest query sees all; a static cache may be longer than the rows.
        v_BGSK: Values.
        window_size: Number of keys that a query sees; None for all.
        bounds: Where the packed documents start in the flattened rows, and their end, `[N + 1]`; or None.
    """
    assert parallax_attention is not None
    assert parallax_decode is not None
    batch, _, num_tokens = q_BHTK.shape[:3]
    # gains may be fp32 in a 16-bit model
    dtype = v_BGSK.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q_BHTK, k_BGSK, v_BGSK))
    r = None if r_BHTK is None else r_BHTK.to(dtype).transpose(1, 2)
    if num_tokens == 1:
        lengths = torch.full((batch,), k.shape[1], dtype=torch.int32, device=q.device)
        return parallax_decode(q, r, k, v, cache_seqlens=lengths).transpose(1, 2)
    k, v = k[:, :num_tokens], v[:, :num_tokens]
    if bounds is not None:
        q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
        r = None if r is None else r.flatten(0, 1).unsqueeze(0)
    o_BTHK = parallax_attention(q, r, k, v, cu_seqlens=bounds, window_size=window_size)
    return o_BTHK.reshape(batch, num_tokens, *o_BTHK.shape[2:]).transpose(1, 2)
