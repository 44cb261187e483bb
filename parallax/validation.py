"""Argument checks of the public functions; messages give the argument, got, wanted and the remedy."""

from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes that q, r, k and v may have."""


def check_tensors(q: Tensor, r: Tensor | None, k: Tensor, v: Tensor) -> None:
    """Check shapes, dtypes and devices of the inputs of self-attention.

    Args:
        q: Queries `[B, T, H, K]`.
        r: Probes `[B, T, H, K]`, or None.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.

    Raises:
        ValueError: Shapes or devices do not match.
        TypeError: Dtypes differ or are not floating.
    """
    named = {"q": q, "k": k, "v": v} if r is None else {"q": q, "r": r, "k": k, "v": v}
    for name, x in named.items():
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, wanted four dimensions "
                "[batch, tokens, heads, head width]; split the projection into heads"
            )
    if r is not None and r.shape != q.shape:
        raise ValueError(
            f"r has shape {tuple(r.shape)}, q {tuple(q.shape)}; wanted equal shapes: one probe per query head"
        )
    if v.shape != k.shape:
        raise ValueError(
            f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}; wanted equal shapes: one value for each key"
        )
    _check_keys_fit(q, k)
    for name, x in named.items():
        _check_like_q(name, x, q)


def _check_like_q(name: str, x: Tensor, q: Tensor) -> None:
    """Check an input's dtype and device against q's."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}, wanted bfloat16, float16, float32 or float64; cast it before")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} is {x.dtype}, q {q.dtype}; wanted one dtype: cast all of them to it")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}; wanted one device: move {name} there")


def _check_keys_fit(q: Tensor, k: Tensor) -> None:
    """Check k's shape against q's."""
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]}, q {q.shape[0]}; wanted the same batch")
    if k.shape[1] != q.shape[1]:
        raise ValueError(
            f"k has {k.shape[1]} tokens, q {q.shape[1]}; wanted as many keys as queries: "
            "this is causal self-attention"
        )
    _check_heads_fit(q, k, "k")


def _check_heads_fit(q: Tensor, k: Tensor, name: str) -> None:
    """Check head widths and numbers of heads of keys against queries."""
    if k.shape[3] != q.shape[3] or q.shape[3] < 1:
        raise ValueError(
            f"{name} has head width {k.shape[3]}, q {q.shape[3]}; wanted one width of at least 1"
        )
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads ({num_heads}) must be a positive multiple of num_kv_heads ({num_kv_heads}); "
            "choose key/value heads that divide the query heads"
        )


def check_window_size(window_size: int | None) -> None:
    """Check the size of the sliding window.

    Args:
        window_size: Number of newest keys that a query sees, its own included; None for all.

    Raises:
        ValueError: The window is below 1.
    """
    if window_size is not None and window_size < 1:
        raise ValueError(
            f"window_size is {window_size}, wanted at least 1 (the query's own key); pass None for no window"
        )


def check_scale(scale: float | None) -> None:
    """Check the factor of q.k.

    Args:
        scale: None for the default.

    Raises:
        ValueError: It is NaN or infinite.
    """
    if scale is not None and not -float("inf") < scale < float("inf"):
        raise ValueError(
            f"scale is {scale}, wanted a finite factor of q.k; pass None for 1 / sqrt(head width)"
        )


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    """Check document bounds, and their values where that needs no device synchronization.

    Args:
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T.
        x: Packed tensor `[1, T, ...]`.

    Raises:
        ValueError: Wrong batch, dimension, dtype, device or (on CPU, outside of tracing) values.
    """
    if x.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs batch 1, got batch {x.shape[0]}; flatten the inputs to [1, B * T, ...]"
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
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the inputs on {x.device}; move it there")
    # a subclass may be a fake tensor, whose values cannot be read
    is_readable = cu_seqlens.device.type == "cpu" and type(cu_seqlens) is Tensor
    if not torch.compiler.is_compiling() and is_readable:
        check_bounds(cu_seqlens.tolist(), x.shape[1])


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


def check_decode_tensors(
    q: Tensor,
    r: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    out: Tensor | None,
) -> None:
    """Check shapes, dtypes and devices of the inputs of decoding.

    Args:
        q: Queries `[B, T, H, K]`.
        r: Probes `[B, T, H, K]`, or None.
        k_cache: Keys `[B, S, G, K]`, or pages `[P, page size, G, K]`.
        v_cache: Values, as the keys.
        cache_seqlens: Keys of each sequence `[B]` int32.
        page_table: Pages of each sequence `[B, pages]` int32, or None.
        out: `[B, T, H, K]` to write to, or None.

    Raises:
        ValueError: Shapes or devices do not match.
        TypeError: Dtypes differ or are not served.
    """
    like_q = {name: x for name, x in (("r", r), ("out", out)) if x is not None}
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **like_q}
    for name, x in named.items():
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, wanted four: [batch, tokens, heads, head width]"
            )
        _check_like_q(name, x, q)
    for name, x in like_q.items():
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, q {tuple(q.shape)}; wanted equal shapes")
    if out is not None and not out.is_contiguous():
        raise ValueError("out is not contiguous; allocate it with torch.empty(q.shape, ...)")
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"v_cache has shape {tuple(v_cache.shape)}, k_cache {tuple(k_cache.shape)}; wanted equal shapes"
        )
    _check_heads_fit(q, k_cache, "k_cache")
    _check_index("cache_seqlens", cache_seqlens, q, 1)
    if page_table is not None:
        _check_index("page_table", page_table, q, 2)
    elif k_cache.shape[0] != q.shape[0]:
        raise ValueError(
            f"k_cache has batch {k_cache.shape[0]}, q {q.shape[0]}; wanted the same batch, "
            "or a page_table that assigns pages to sequences"
        )


def _check_index(name: str, index: Tensor, q: Tensor, num_dims: int) -> None:
    """Check cache_seqlens or page_table against q's batch and device."""
    wanted = "[B]" if num_dims == 1 else "[B, pages]"
    if index.ndim != num_dims or index.shape[0] != q.shape[0]:
        raise ValueError(f"{name} has shape {tuple(index.shape)}, wanted {wanted} with B = {q.shape[0]}")
    if index.dtype != torch.int32:
        raise TypeError(f"{name} is {index.dtype}, wanted torch.int32; call {name}.to(torch.int32)")
    if index.device != q.device:
        raise ValueError(f"{name} is on {index.device}, q on {q.device}; wanted one device: move {name}")
    if index.stride(-1) != 1 and index.shape[-1] > 1:
        raise ValueError(f"{name} is not contiguous along its last dimension; call {name}.contiguous()")


def check_cache_values(cache_seqlens: Tensor, page_table: Tensor | None, k_cache: Tensor) -> None:
    """Check the values of lengths and page numbers; synchronizes with the device.

    Args:
        cache_seqlens: Keys of each sequence `[B]` int32.
        page_table: Pages of each sequence `[B, pages]` int32, or None.
        k_cache: Keys `[B, S, G, K]`, or pages `[P, page size, G, K]`.

    Raises:
        ValueError: A length is negative, a sequence is longer than the cache, or a page that it needs is not
            in it.
    """
    num_pages, page_size = k_cache.shape[:2]
    capacity = page_size if page_table is None else page_table.shape[1] * page_size
    for row, length in enumerate(cache_seqlens.tolist()):
        if length < 0:
            raise ValueError(
                f"cache_seqlens[{row}] is {length}, wanted at least 0: the number of keys of the sequence"
            )
        if length > capacity:
            raise ValueError(
                f"cache_seqlens[{row}] is {length}, the cache holds {capacity} keys per sequence; "
                "allocate a longer cache, or more pages per sequence"
            )
        pages = [] if page_table is None else page_table[row, : -(-length // page_size)].tolist()
        for index, page in enumerate(pages):
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"page_table[{row}, {index}] is {page}, wanted a page from 0 to {num_pages - 1}"
                )
