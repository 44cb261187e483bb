"""Attention of new tokens over a KV cache: validate, pick the implementation, call it."""

import torch
from torch import Tensor

from parallax import eager_decode
from parallax.validation import check_cache_values, check_decode_tensors, check_scale, check_window_size


@torch.library.custom_op("parallax::decode", mutates_args=("out",))
def _decode(
    q: Tensor,
    r: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    window_size: int | None,
    scale: float,
    out: Tensor,
    use_kernels: bool,
) -> None:
    if use_kernels:
        from parallax.kernels import decode as implementation
    else:
        implementation = eager_decode
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        implementation.decode(q, r, k_cache, v_cache, cache_seqlens, page_table, window_size, scale, out)


_decode.register_fake(lambda *arguments: None)


def parallax_decode(
    q: Tensor,
    r: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    window_size: int | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
    check_values: bool = False,
) -> Tensor:
    """Compute Parallax or softmax attention of new tokens over a KV cache; not differentiable.

    Query t of a sequence with n keys sees the keys up to n - T + t; the cache already holds the new tokens'
    own keys. Cache entries from n on are ignored, even NaN. The output of a query that sees no key is zero.
    On a GPU a call can be captured in a CUDA graph, which then serves all lengths.

    Args:
        q: Queries `[B, T, H, K]` of the T newest tokens, bf16/fp16/fp32/fp64; the kernels serve bf16
            and fp16, T up to 8, H / G up to 16, K of 64 and 128.
        r: Probes `[B, T, H, K]`; None for softmax attention.
        k_cache: Keys `[B, S, G, K]`; with `page_table` pages `[P, page size, G, K]`.
        v_cache: Values, the shape of k_cache.
        cache_seqlens: Keys of each sequence `[B]` int32, those of the new tokens included.
        page_table: Pages of each sequence in order `[B, pages]` int32, with any values past its last page;
            None for a contiguous cache.
        window_size: Number of newest keys that a query sees, its own included; None for all.
        scale: Factor of q.k (never of r.k); None for 1 / sqrt(K).
        out: `[B, T, H, K]`, contiguous, the dtype of q, to write to; None for a new one.
        impl: "triton" or "eager"; None for the kernels where they serve.
        check_values: Check the values of cache_seqlens and page_table on a GPU too, which synchronizes; on
            CPU they are always checked.

    Returns:
        Output `[B, T, H, K]` in the dtype of q.

    Raises:
        ValueError: Shapes, devices, `window_size`, `scale`, the implementation's name, or a value of
            `cache_seqlens` (negative, or longer than the cache) or of `page_table` (no page of the cache) is
            wrong.
        TypeError: Dtypes differ or are not served.
        NotImplementedError: impl is "triton", which cannot serve these inputs; the message says why.
    """
    check_decode_tensors(q, r, k_cache, v_cache, cache_seqlens, page_table, out)
    check_window_size(window_size)
    check_scale(scale)
    is_readable = cache_seqlens.device.type == "cpu" and type(cache_seqlens) is Tensor
    if not torch.compiler.is_compiling() and (check_values or is_readable):
        check_cache_values(cache_seqlens, page_table, k_cache)
    q, k_cache, v_cache = (_with_contiguous_rows(x) for x in (q, k_cache, v_cache))
    r = None if r is None else _with_contiguous_rows(r)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    use_kernels = _use_kernels(impl, q, k_cache)
    _decode(q, r, k_cache, v_cache, cache_seqlens, page_table, window_size, scale, out, use_kernels)
    return out


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _use_kernels(impl: str | None, q: Tensor, k_cache: Tensor) -> bool:
    if impl not in (None, "triton", "eager"):
        raise ValueError(f"impl is {impl!r}, wanted 'triton', 'eager', or None to pick by device and shape")
    if impl == "eager" or (impl is None and q.device.type != "cuda"):
        return False
    from parallax.kernels.decode import refusal

    reason = refusal(q, k_cache)
    if impl == "triton" and reason is not None:
        raise NotImplementedError(f"impl='triton' {reason}; use 'eager'")
    return reason is None
