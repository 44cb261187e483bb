"""Attention with uniform weights, (17) of `parallax.reference`, in linear time.

With p_ij = 1 / n_i every sum over keys is a causal product sum_{j <= i} (x_i.y_j) z_j, which
`parallax.causal_product` computes. (5) becomes one such product with a column of ones:

    o_i = (1 / n_i) sum_j ([-r_i, 1 + tbar_i].[k_j, 1]) v_j,    tbar_i = r_i.kbar_i,

and likewise (8) to (11). Windows are not supported, as their state would grow with the window; use
`parallax_attention` or `local_linear_attention` with scale = 0.

Letters: B batch, T tokens, G key/value heads, R = H / G, K head width; X = K + 1.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallax.causal_product import attend_past, causal_product, sum_past
from parallax.conjugate_gradients import LinearMap, conjugate_gradients, residual_tolerance
from parallax.local_linear import check_num_iterations, check_ridge, promote
from parallax.validation import DTYPES, check_cu_seqlens, check_tensors


class _Documents(NamedTuple):
    """Document of each token of packed rows."""

    ids_T: Tensor  # int64, equal within a document
    counts_T1: Tensor  # n_i: keys of the document up to the query's own


def value_average(v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Compute the causal mean of the values (17): uniform weights, an intercept, no probe.

    Runs in at least fp32, also under autocast.

    Args:
        v: Values `[B, T, G, K]`, bf16/fp16/fp32/fp64, any strides.
        cu_seqlens: Bounds of packed documents `[N + 1]`, int32, rising from 0 to T, on v's device, with
            B == 1; empty documents are allowed. None: each batch row is one document.

    Returns:
        Means `[B, T, G, K]` in the dtype of v.

    Raises:
        ValueError: v or `cu_seqlens` has a wrong shape or device.
        TypeError: The dtype is not served.
    """
    if v.ndim != 4:
        raise ValueError(
            f"v has shape {tuple(v.shape)}, wanted four dimensions [batch, tokens, heads, head width]; "
            "split the projection into heads"
        )
    if v.dtype not in DTYPES:
        raise TypeError(f"v is {v.dtype}, wanted bfloat16, float16, float32 or float64; cast it before")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, v)
    (promoted,) = promote(v)
    v_BGRTK = _by_group(promoted, v.shape[2])
    return _by_token(_mean(v_BGRTK, _documents(v_BGRTK, cu_seqlens))).to(v.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Compute causal linear attention o_i = sum_j (q_i.k_j) v_j / n_i (17): no intercept.

    Runs in at least fp32, also under autocast. q.k is not scaled, apart from the mean
    over the n_i visible keys.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32/fp64, any strides.
        k: Keys `[B, T, G, K]`; query head h reads key/value head h // (H / G).
        v: Values `[B, T, G, K]`.
        cu_seqlens: Bounds of packed documents `[N + 1]`, int32, rising from 0 to T, on q's device, with
            B == 1; empty documents are allowed. None: each batch row is one document.

    Returns:
        Output `[B, T, H, K]` in the dtype of v.

    Raises:
        ValueError: Shapes, devices or `cu_seqlens` are wrong.
        TypeError: Dtypes are not served, or fp64 is mixed with another.
    """
    q_BGRTK, k_BGRTK, v_BGRTK = _prepare(q, k, v, cu_seqlens)
    documents = _documents(q_BGRTK, cu_seqlens)
    o_BGRTK = causal_product(q_BGRTK, k_BGRTK, v_BGRTK, documents.ids_T, False) / documents.counts_T1
    return _by_token(o_BGRTK).to(v.dtype)


def affine_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Compute causal affine linear attention o_i = vbar_i - Cov(v, k)_i q_i, (4) with uniform weights.

    `parallax_attention` with scale = 0, whose probe r is q here; zero probes give `value_average`. Runs in at
    least fp32, also under autocast.

    Args:
        q: Probes `[B, T, H, K]`, bf16/fp16/fp32/fp64, any strides.
        k: Keys `[B, T, G, K]`; query head h reads key/value head h // (H / G).
        v: Values `[B, T, G, K]`.
        cu_seqlens: Bounds of packed documents `[N + 1]`, int32, rising from 0 to T, on q's device, with
            B == 1; empty documents are allowed. None: each batch row is one document.

    Returns:
        Output `[B, T, H, K]` in the dtype of v.

    Raises:
        ValueError: Shapes, devices or `cu_seqlens` are wrong.
        TypeError: Dtypes are not served, or fp64 is mixed with another.
    """
    r_BGRTK, k_BGRTK, v_BGRTK = _prepare(q, k, v, cu_seqlens)
    return _by_token(_affine_linear(r_BGRTK, k_BGRTK, v_BGRTK, _documents(r_BGRTK, cu_seqlens))).to(v.dtype)


def affine_mesanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float = 10.0,
    cu_seqlens: Tensor | None = None,
    num_iterations: int = 32,
) -> Tensor:
    """Compute causal affine MesaNet: affine linear attention whose probe solves (16).

    `local_linear_attention` with scale = 0. An infinite ridge is `value_average`. Solved by conjugate
    gradients in at least fp32, also under autocast; the gradient through the solve is (18).

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32/fp64, any strides.
        k: Keys `[B, T, G, K]`; query head h reads key/value head h // (H / G).
        v: Values `[B, T, G, K]`.
        ridge: Ridge per key, as in `local_linear_attention`; 10 is the default of LLA.
        cu_seqlens: Bounds of packed documents `[N + 1]`, int32, rising from 0 to T, on q's device, with
            B == 1; empty documents are allowed. None: each batch row is one document.
        num_iterations: Maximum number of conjugate-gradient iterations; converged rows stop earlier.

    Returns:
        Output `[B, T, H, K]` in the dtype of v.

    Raises:
        ValueError: Shapes, devices or an option are wrong.
        TypeError: Dtypes are not served, or fp64 is mixed with another.
    """
    q_BGRTK, k_BGRTK, v_BGRTK = _prepare(q, k, v, cu_seqlens)
    check_ridge(ridge, q_BGRTK.dtype)
    check_num_iterations(num_iterations)
    documents = _documents(q_BGRTK, cu_seqlens)
    tolerance = residual_tolerance(q.dtype, k.dtype)
    r_BGRTK = affine_probe(q_BGRTK, k_BGRTK, *documents, ridge, num_iterations, tolerance)
    return _by_token(_affine_linear(r_BGRTK, k_BGRTK, v_BGRTK, documents)).to(v.dtype)


@torch.library.custom_op("parallax::affine_probe", mutates_args=())
def affine_probe(
    q: Tensor, k: Tensor, ids: Tensor, counts: Tensor, ridge: float, num_iterations: int, tolerance: float
) -> Tensor:
    """Solve (16) for the probe under uniform weights, as one custom operator.

    Args:
        q: Queries `[B, G, R, T, K]`, fp32/fp64.
        k: Keys `[B, G, 1, T, K]`.
        ids: Document of each token `[T]`, int64.
        counts: Keys that each query sees `[T, 1]`, dtype of q.
        ridge: Ridge per key.
        num_iterations: Maximum number of conjugate-gradient iterations.
        tolerance: Relative residual at which a row stops.

    Returns:
        Probes `[B, G, R, T, K]`.
    """
    with torch.autocast(q.device.type, enabled=False):
        documents = _Documents(ids, counts)
        apply = _covariances(k, documents, ridge, num_repeats=q.shape[2])
        return conjugate_gradients(apply, (_mean(k, documents) - q).contiguous(), num_iterations, tolerance)


@affine_probe.register_fake
def _affine_probe_fake(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("parallax::affine_probe_backward", mutates_args=())
def affine_probe_backward(
    dr: Tensor,
    r: Tensor,
    k: Tensor,
    ids: Tensor,
    counts: Tensor,
    ridge: float,
    num_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients (18) under uniform weights, as one custom operator.

    Args:
        dr: Gradient of the probe `[B, G, R, T, K]`.
        r: From `affine_probe`.
        k: Keys `[B, G, 1, T, K]`; this and all further arguments as in `affine_probe`.
        ids: Document of each token `[T]`.
        counts: Keys that each query sees `[T, 1]`.
        ridge: Ridge per key.
        num_iterations: Maximum number of conjugate-gradient iterations.
        tolerance: Relative residual at which a row stops.

    Returns:
        `dq [B, G, R, T, K]` and `dk [B, G, 1, T, K]`.
    """
    with torch.autocast(k.device.type, enabled=False):
        documents = _Documents(ids, counts)
        apply = _covariances(k, documents, ridge, num_repeats=dr.shape[2])
        y = conjugate_gradients(apply, dr.contiguous(), num_iterations, tolerance)
        return -y, _keys_gradient(y, r, k, documents)


@affine_probe_backward.register_fake
def _affine_probe_backward_fake(dr: Tensor, r: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return r.new_empty(r.shape), k.new_empty(k.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, k, ids, counts, *ctx.options = inputs
    ctx.save_for_backward(output, k, ids, counts)


def _differentiate(ctx: Any, dr: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = affine_probe_backward(dr, *ctx.saved_tensors, *ctx.options)
    return dq, dk, None, None, None, None, None


affine_probe.register_autograd(_differentiate, setup_context=_save_for_backward)


def _covariances(k_BGRTK: Tensor, documents: _Documents, ridge: float, num_repeats: int) -> LinearMap:
    """Return x_i -> (Cov(k, k)_i + ridge I) x_i for `num_repeats` query heads per key head."""
    kbar_BGRTK = _mean(k_BGRTK, documents)
    past = sum_past(F.pad(k_BGRTK, (0, 1), value=1.0), k_BGRTK, documents.ids_T)
    # expand to query heads once, not in every product
    y, z, state = (x.expand(-1, -1, num_repeats, -1, -1, -1).contiguous() for x in past[:3])
    past = past._replace(y_BGRNCX=y, z_BGRNCW=z, state_BGRNXW=state)

    def apply(x_BGRTK: Tensor) -> Tensor:
        o_BGRTK = attend_past(_affine_weights(x_BGRTK, kbar_BGRTK), past) / documents.counts_T1
        return torch.sub(kbar_BGRTK, o_BGRTK).add_(x_BGRTK, alpha=ridge)

    return apply


def _affine_linear(r_BGRTK: Tensor, k_BGRTK: Tensor, v_BGRTK: Tensor, documents: _Documents) -> Tensor:
    """Compute (5) with uniform weights."""
    x_BGRTX = _affine_weights(r_BGRTK, _mean(k_BGRTK, documents))
    ones_BGRTX = F.pad(k_BGRTK, (0, 1), value=1.0)
    return causal_product(x_BGRTX, ones_BGRTX, v_BGRTK, documents.ids_T, False) / documents.counts_T1


def _affine_weights(r_BGRTK: Tensor, kbar_BGRTK: Tensor) -> Tensor:
    """Return [-r_i, 1 + tbar_i], whose product with [k_j, 1] is n_i w_ij."""
    tbar_BGRT1 = (r_BGRTK * kbar_BGRTK).sum(-1, keepdim=True)
    return torch.cat((-r_BGRTK, 1 + tbar_BGRT1), dim=-1)


def _keys_gradient(do_BGRTK: Tensor, r_BGRTK: Tensor, k_BGRTK: Tensor, documents: _Documents) -> Tensor:
    """Compute dK + dV of (11), where the values are the keys; contiguous `[B, G, 1, T, K]`."""
    kbar_BGRTK, ones_BGRTX = _mean(k_BGRTK, documents), F.pad(k_BGRTK, (0, 1), value=1.0)
    do_BGRTK = do_BGRTK / documents.counts_T1
    u_BGRTX = torch.cat((-do_BGRTK, (do_BGRTK * kbar_BGRTK).sum(-1, keepdim=True)), dim=-1)
    w_BGRTX = _affine_weights(r_BGRTK, kbar_BGRTK)
    dk_BGRTK = causal_product(ones_BGRTX, u_BGRTX, r_BGRTK, documents.ids_T, True)
    dv_BGRTK = causal_product(ones_BGRTX, w_BGRTX, do_BGRTK, documents.ids_T, True)
    return (dk_BGRTK + dv_BGRTK).sum(2, keepdim=True)


def _mean(x_BGRTK: Tensor, documents: _Documents) -> Tensor:
    """Return the mean over the tokens that each query sees."""
    ones_BGRT1 = torch.ones_like(x_BGRTK[..., :1])
    return causal_product(ones_BGRT1, ones_BGRT1, x_BGRTK, documents.ids_T, False) / documents.counts_T1


def _prepare(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the inputs and return them promoted: q `[B, G, R, T, K]`, k and v `[B, G, 1, T, K]`."""
    q, k, v = promote(q_BTHK, k_BTGK, v_BTGK)
    check_tensors(q, q, k, v)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
    num_kv_heads = k.shape[2]
    return _by_group(q, num_kv_heads), _by_group(k, num_kv_heads), _by_group(v, num_kv_heads)


def _documents(like_BGRTK: Tensor, cu_seqlens: Tensor | None) -> _Documents:
    position_T = torch.arange(like_BGRTK.shape[3], device=like_BGRTK.device)
    ids_T, first_T = torch.zeros_like(position_T), torch.zeros_like(position_T)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        ids_T = torch.searchsorted(bounds, position_T, right=True)
        first_T = bounds[ids_T - 1]
    return _Documents(ids_T, (position_T - first_T + 1).to(like_BGRTK.dtype)[:, None])


def _by_group(x_BTHK: Tensor, num_kv_heads: int) -> Tensor:
    return x_BTHK.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _by_token(x_BGRTK: Tensor) -> Tensor:
    return x_BGRTK.permute(0, 3, 1, 2, 4).flatten(2, 3)
