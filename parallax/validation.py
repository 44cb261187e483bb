"""What the public functions check before they compute: every message says what, got, wanted, remedy."""

from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes that q, r, k and v may have."""


def check_tensors(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shapes, dtypes and devices of self-attention's inputs.

    Args:
        q: Queries `[B, T, H, K]`.
        r: Probes `[B, T, H, K]`.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.

    Raises:
        ValueError: Shapes or devices do not fit together.
        TypeError: Dtypes differ or are not floating.
    """
    named = {"q": q, "r": r, "k": k, "v": v}
    for name, x in named.items():
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, wanted four dimensions "
                "[batch, tokens, heads, head width]; split the projection into heads"
            )
    if r.shape != q.shape:
        raise ValueError(
            f"r has shape {tuple(r.shape)}, q {tuple(q.shape)}; wanted equal shapes: one probe per query head"
        )
    if v.shape != k.shape:
        raise ValueError(
            f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}; wanted equal shapes: one value for each key"
        )
    _check_keys_fit(q, k)
    for name, x in named.items():
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {x.dtype}, wanted bfloat16, float16, float32 or float64; cast it before"
            )
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, q {q.dtype}; wanted one dtype: cast all four or use autocast"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} is on {x.device}, q on {q.device}; wanted one device: move {name} there"
            )


def _check_keys_fit(q: Tensor, k: Tensor) -> None:
    """Check k's shape against q's."""
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]}, q {q.shape[0]}; wanted the same batch")
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f"k has {k.shape[1]} tokens, q {q.shape[1]}; wanted as many keys as queries: "
            "this is causal self-attention"
        )
    if k.shape[3] != q.shape[3] or q.shape[3] < 1:
        raise ValueError(f"k has head width {k.shape[3]}, q {q.shape[3]}; wanted one width of at least 1")
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads ({num_heads}) must be a positive multiple of num_kv_heads ({num_kv_heads}); "
            "choose key/value heads that divide the query heads"
        )


def check_window_size(window_size: int | None) -> None:
    """Check the sliding window.

    Args:
        window_size: Number of newest keys that a query sees, its own included; None for all.

    Raises:
        ValueError: The window is below 1.
    """
    if window_size is not None and window_size < 1:
        raise ValueError(
            f"window_size is {window_size}, wanted at least 1 (the query's own key); pass None for no window"
        )


def check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    """Check document bounds; their values only where that costs no synchronisation of a device.

    Args:
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T.
        q: Queries `[1, T, H, K]`.

    Raises:
        ValueError: Wrong batch, dimension, dtype, device or (on CPU, outside of tracing) values.
    """
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs batch 1, got batch {q.shape[0]}; "
            "flatten the inputs to [1, B * T, heads, head width]"
        )
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype}, wanted torch.int32; call cu_seqlens.to(torch.int32)"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, wanted [N + 1] for N >= 1 documents; "
            "pass None for one document"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}; wanted one device: move cu_seqlens"
        )
    # a subclass may be a fake tensor, whose values cannot be read
    is_readable = cu_seqlens.device.type == "cpu" and type(cu_seqlens) is Tensor
    if not torch.compiler.is_compiling() and is_readable:
        check_bounds(cu_seqlens.tolist(), q.shape[1])


def check_bounds(bounds: list[int], num_tokens: int) -> None:
    """Check the values of document bounds.

    Args:
        bounds: `cu_seqlens` on the host.
        num_tokens: T.

    Raises:
        ValueError: The bounds do not rise from 0 to T.
    """
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens starts at {bounds[0]}, wanted 0; prepend 0 to the documents' ends")
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if stop < start:
            raise ValueError(
                f"cu_seqlens decreases from {start} to {stop} at index {index + 1}; "
                "wanted the running sum of document lengths"
            )
    if bounds[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens ends at {bounds[-1]}, wanted the number of tokens {num_tokens}; "
            "give the padding its own document"
        )
