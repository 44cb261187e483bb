"""The public functions: validate, pick the implementation, call it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parallax.ops import eager_attention, triton_attention
from parallax.reference import parallax_reference
from parallax.validation import check_cu_seqlens, check_scale, check_tensors, check_window_size


class _Implementation(NamedTuple):
    """How to call an implementation, and what it cannot do."""

    call: Callable[..., Tensor]
    refuse: Callable[[Tensor, float], str | None]  # (q, scale) -> why it cannot serve, or None


def _refuse_nothing(q: Tensor, scale: float) -> str | None:
    return None


def _refuse_by_kernels(q: Tensor, scale: float) -> str | None:
    from parallax.kernels.tiles import refusal

    return refusal(q, scale)


_IMPLEMENTATIONS = {
    "reference": _Implementation(parallax_reference, _refuse_nothing),
    "eager": _Implementation(eager_attention, _refuse_nothing),
    "triton": _Implementation(triton_attention, _refuse_by_kernels),
}
"""Whatever is here can be asked for by name."""

_PREFERRED = {"cuda": ("triton", "eager")}
"""What `impl=None` tries, in this order, by device type; elsewhere eager."""


def parallax_attention(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute causal Parallax or softmax attention, differentiable in q, r, k and v.

    o_i = sum_j p_ij (1 + tbar_i - t_ij) v_j with p = softmax(scale q.k), t_ij = r_i.k_j,
    tbar_i = sum_j p_ij t_ij (arXiv 2605.29157; derived in `parallax.reference`). With r = None it is softmax
    attention, o_i = sum_j p_ij v_j, by kernels that do only what that needs: 2 products of tokens by tokens
    forward and 7 backward, instead of 4 and 11.

    Under autocast the inputs are cast to its dtype, as torch's own attention does.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32/fp64, any strides.
        r: Probes `[B, T, H, K]`, same dtype and device; None for softmax attention.
        k: Keys `[B, T, G, K]`; query head h reads key/value head h // (H / G).
        v: Values `[B, T, G, K]`.
        scale: Factor of q.k (never of r.k); None for 1 / sqrt(K).
        cu_seqlens: Bounds of packed documents `[N + 1]`, int32, rising from 0 to T, on q's device, with
            B == 1; empty documents are allowed. None: each batch row is one document.
        window_size: Number of newest keys that a query sees, its own included; None for all.
        impl: "eager", "triton" or "reference"; None picks by device, shape and scale.

    Returns:
        Output `[B, T, H, K]` in the dtype of the inputs.

    Raises:
        ValueError: Shapes, devices, `scale`, `cu_seqlens`, `window_size` or the name of the implementation
            are wrong.
        TypeError: Dtypes differ or are not served.
        NotImplementedError: The implementation asked for cannot serve these inputs; names those that can.
    """
    if r is None:
        q, k, v = cast_under_autocast(q, k, v)
    else:
        q, r, k, v = cast_under_autocast(q, r, k, v)
    check_tensors(q, r, k, v)
    check_window_size(window_size)
    check_scale(scale)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = _pick(impl, q, scale).call
    return call(q, r, k, v, scale=scale, cu_seqlens=cu_seqlens, window_size=window_size)


def _pick(impl: str | None, q: Tensor, scale: float) -> _Implementation:
    """Return the implementation asked for, or the first preferred one that serves; never another one."""
    if impl is None:
        preferred = _PREFERRED.get(q.device.type, ("eager",))
        return next(_IMPLEMENTATIONS[name] for name in preferred if _refusal(name, q, scale) is None)
    if impl not in _IMPLEMENTATIONS:
        names = ", ".join(map(repr, _IMPLEMENTATIONS))
        raise ValueError(f"impl is {impl!r}, wanted one of {names}, or None to pick by device")
    refusal = _refusal(impl, q, scale)
    if refusal is not None:
        able = [name for name in _IMPLEMENTATIONS if _refusal(name, q, scale) is None]
        raise NotImplementedError(f"impl={impl!r} {refusal}; use one of {', '.join(map(repr, able))}")
    return _IMPLEMENTATIONS[impl]


def _refusal(name: str, q: Tensor, scale: float) -> str | None:
    """Return why an implementation cannot serve, or None."""
    return _IMPLEMENTATIONS[name].refuse(q, scale)


def cast_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype where it is on; fp64 stays, as in torch's own rule."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
