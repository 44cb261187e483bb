"""Exact local linear attention: Parallax attention whose probe is solved, not learned.

By (16) of `parallax.reference` the probe solves A_i r_i = kbar_i - q_i with A_i = Cov_p(k, k)_i + ridge I;
the rest is (4). So all work over the keys is Parallax attention in fp32 (fp64 for fp64), computed by the
Triton kernels where they serve (CUDA, their head widths, a positive scale), else by `parallax.eager`.

* Conjugate gradients need only A x, and by (4) Cov_p(k, k) x = kbar - o(q, x, k, k).
* The gradient through the solve is (18): one more solve with the same matrices, for y, then the backward of
  o(q, r, k, k). No iterates are saved.

The direct solver builds A for a few queries at a time and factors it. Memory besides inputs and outputs is a
tile `[B, H, tile, T]` for `parallax.eager`, and buffers of `_DIRECT_ELEMENTS` numbers for the direct solver.
Saved for the backward: q, k, v, r, and two statistics per row; o and vbar too where the kernels run.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from parallax import eager
from parallax.conjugate_gradients import conjugate_gradients, residual_tolerance
from parallax.decode import parallax_decode
from parallax.ops import eager_attention, triton_attention
from parallax.validation import check_bounds, check_cu_seqlens, check_scale, check_tensors, check_window_size

MIN_FP32_RIDGE = 1e-3
"""Below it rounding in fp32 alone can move the output by some percent, for inputs of unit variance."""
_DIRECT_ELEMENTS = 2**23
"""Elements in a buffer of the direct solver, 32 MiB in fp32; at least the matrices of one query."""


def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float = 10.0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
    solver: Literal["cg", "direct"] = "cg",
    num_iterations: int = 32,
) -> Tensor:
    """Compute causal, exact local linear attention (LLA), differentiable in q, k and v.

    For each query an affine map from keys to values is fitted by ridge regression under softmax weights and
    evaluated at the query: (15) of `parallax.reference` (arXiv 2510.01450), computed as (16). An infinite
    ridge is softmax attention, scale = 0 is `affine_mesanet`.

    Runs in at least fp32, also under autocast.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32/fp64, any strides.
        k: Keys `[B, T, G, K]`; query head h reads key/value head h // (H / G).
        v: Values `[B, T, G, K]`.
        ridge: Ridge per unit of kernel mass, finite and at least MIN_FP32_RIDGE, in fp64 positive; 10 in the
            authors' code. Ridges below 0.1 take more than the 32 iterations.
        scale: Factor of q.k in the kernel; None for 1 / sqrt(K).
        cu_seqlens: Bounds of packed documents `[N + 1]`, int32, rising from 0 to T, on q's device, with
            B == 1; empty documents are allowed. None: each batch row is one document.
        window_size: Number of newest keys that a query sees, its own included; None for all.
        solver: "cg" for conjugate gradients, T^2 K operations per iteration; "direct" to build and factor
            the matrix of every query, T^2 K^2 operations.
        num_iterations: Maximum number of conjugate-gradient iterations, 32 in the authors' code; converged
            rows stop earlier. The gradient is that of the exact solution.

    Returns:
        Output `[B, T, H, K]` in the dtype of v.

    Raises:
        ValueError: Shapes, devices or an option are wrong.
        TypeError: Dtypes are not served, or fp64 is mixed with another.
    """
    dtype, input_dtypes = v.dtype, (q.dtype, k.dtype)
    q, k, v = promote(q, k, v)
    check_tensors(q, q, k, v)
    check_window_size(window_size)
    check_scale(scale)
    check_ridge(ridge, q.dtype)
    check_num_iterations(num_iterations)
    if solver not in ("cg", "direct"):
        raise ValueError(f"solver is {solver!r}, wanted 'cg' or 'direct'; 'cg' is the faster one")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    iterations = num_iterations if solver == "cg" else None
    tolerance = residual_tolerance(*input_dtypes)
    r = local_linear_probe(q, k, cu_seqlens, scale, ridge, window_size, iterations, tolerance)
    attend = triton_attention if _kernels_serve(q, scale) else eager_attention
    o = attend(q, r, k, v, scale=scale, cu_seqlens=cu_seqlens, window_size=window_size)
    return o.to(dtype)


@torch.no_grad()
def local_linear_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    ridge: float = 10.0,
    scale: float | None = None,
    window_size: int | None = None,
    num_iterations: int = 32,
) -> Tensor:
    """Compute local linear attention of the newest tokens of each sequence over its KV cache.

    Solves (16) by conjugate gradients, whose products are `parallax_decode` with the keys as values, in fp32.

    Args:
        q: Queries `[B, T, H, K]` of the T newest tokens, bf16/fp16/fp32/fp64.
        k_cache: Keys `[B, S, G, K]`.
        v_cache: Values `[B, S, G, K]`.
        cache_seqlens: Keys of each sequence `[B]` int32, those of the new tokens included.
        ridge: As in `local_linear_attention`; likewise the options below.
        scale: Factor of q.k; None for 1 / sqrt(K).
        window_size: Number of newest keys that a query sees; None for all.
        num_iterations: Maximum number of conjugate-gradient iterations.

    Returns:
        Output `[B, T, H, K]` in the dtype of v_cache.

    Raises:
        ValueError: Shapes, devices or an option are wrong.
        TypeError: Dtypes are not served, or fp64 is mixed with another.
    """
    dtype, input_dtypes = v_cache.dtype, (q.dtype, k_cache.dtype)
    q, k, v = promote(q, k_cache, v_cache)
    check_ridge(ridge, q.dtype)
    check_num_iterations(num_iterations)

    def attend(r: Tensor | None, values: Tensor) -> Tensor:
        return parallax_decode(
            q, r, k, values, cache_seqlens=cache_seqlens, window_size=window_size, scale=scale, impl="eager"
        )

    kbar = attend(None, k)
    tolerance = residual_tolerance(*input_dtypes)
    r = conjugate_gradients(lambda x: kbar - attend(x, k) + ridge * x, kbar - q, num_iterations, tolerance)
    return attend(r, v).to(dtype)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Promote floating tensors to fp32; fp64 and other dtypes are unchanged."""
    return tuple(x.to(eager.accumulation_dtype(x.dtype)) if x.is_floating_point() else x for x in tensors)


def check_ridge(ridge: float, dtype: torch.dtype) -> None:
    """Raise ValueError unless the ridge is finite and large enough for the dtype of the solve."""
    is_fp64 = dtype == torch.float64
    is_large_enough = ridge > 0.0 if is_fp64 else ridge >= MIN_FP32_RIDGE
    if not (is_large_enough and ridge < float("inf")):
        wanted = "positive" if is_fp64 else f"at least {MIN_FP32_RIDGE} (in fp64 positive)"
        raise ValueError(
            f"ridge is {ridge}, wanted {wanted} and finite: the first query of a document has one key and no "
            "covariance; take softmax attention for an infinite one"
        )


def check_num_iterations(num_iterations: int) -> None:
    """Raise ValueError unless num_iterations is at least 1."""
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}, wanted at least 1; 32 is usual")


@torch.library.custom_op("parallax::local_linear_probe", mutates_args=())
def local_linear_probe(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    ridge: float,
    window_size: int | None,
    num_iterations: int | None,
    tolerance: float,
) -> Tensor:
    """Solve (16) for the probe, as one custom operator.

    Args:
        q: Queries `[B, T, H, K]`, fp32/fp64.
        k: Keys `[B, T, G, K]`.
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        scale: Factor of q.k.
        ridge: Ridge per unit of kernel mass.
        window_size: Keys that a query sees, or None.
        num_iterations: Maximum number of conjugate-gradient iterations; None to solve directly.
        tolerance: Relative residual at which a row stops.

    Returns:
        Probes `[B, T, H, K]`.
    """
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        kbar = _key_products(q, k, cu_seqlens, scale, window_size).attend(torch.zeros_like(q))
        return _solve(kbar - q, kbar, q, k, cu_seqlens, scale, ridge, window_size, num_iterations, tolerance)


@local_linear_probe.register_fake
def _local_linear_probe_fake(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("parallax::local_linear_probe_backward", mutates_args=())
def local_linear_probe_backward(
    dr: Tensor,
    r: Tensor,
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    ridge: float,
    window_size: int | None,
    num_iterations: int | None,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients (18) of the probe, as one custom operator.

    Args:
        dr: Gradient of the probe `[B, T, H, K]`.
        r: From `local_linear_probe`.
        q: Queries `[B, T, H, K]`, the input of `local_linear_probe`; likewise all that follow.
        k: Keys `[B, T, G, K]`.
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        scale: Factor of q.k.
        ridge: Ridge per unit of kernel mass.
        window_size: Keys that a query sees, or None.
        num_iterations: Maximum number of conjugate-gradient iterations; None to solve directly.
        tolerance: Relative residual at which a row stops.

    Returns:
        `dq [B, T, H, K]` and `dk [B, T, G, K]`.
    """
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        products = _key_products(q, k, cu_seqlens, scale, window_size)
        kbar = products.attend(torch.zeros_like(q))
        y = _solve(dr, kbar, q, k, cu_seqlens, scale, ridge, window_size, num_iterations, tolerance)
        dq, _, dk, dv = products.differentiate(y, r)
        return dq.sub_(y), dk.add_(dv)


@local_linear_probe_backward.register_fake
def _local_linear_probe_backward_fake(
    dr: Tensor, r: Tensor, q: Tensor, k: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    q, k, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(output, q, k, cu_seqlens)


def _differentiate(ctx: Any, dr: Tensor) -> tuple[Tensor | None, ...]:
    r, q, k, cu_seqlens = ctx.saved_tensors
    dq, dk = local_linear_probe_backward(dr, r, q, k, cu_seqlens, *ctx.options)
    return dq, dk, None, None, None, None, None, None


local_linear_probe.register_autograd(_differentiate, setup_context=_save_for_backward)


class _KeyProducts(NamedTuple):
    """Parallax attention with the keys as values, and its gradients, as functions of the probes."""

    attend: Callable[[Tensor], Tensor]  # x -> o(q, x, k, k)
    differentiate: Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # (do, x) -> dq, dx, dk, dv


def _kernels_serve(q: Tensor, scale: float) -> bool:
    """Return whether the Triton kernels serve these inputs, instead of `parallax.eager`."""
    from parallax.kernels.tiles import refusal

    return refusal(q, scale) is None


def _key_products(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, window_size: int | None
) -> _KeyProducts:
    """Return o(q, x, k, k) and its gradients as functions, by the Triton kernels where they serve."""
    options = (cu_seqlens, scale, window_size)
    if not _kernels_serve(q, scale):

        def differentiate_eagerly(do: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            _, lse, tbar = eager.forward(q, x, k, k, *options)
            return eager.backward(do, q, x, k, k, lse, tbar, *options)

        return _KeyProducts(lambda x: eager.forward(q, x, k, k, *options)[0], differentiate_eagerly)

    from parallax.kernels import backward, forward

    def differentiate(do: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        results = forward.forward(q, x, k, k, *options, save_vbar=True)
        return backward.backward(do, q, x, k, k, *results, *options)

    return _KeyProducts(lambda x: forward.forward(q, x, k, k, *options, save_vbar=False)[0], differentiate)


@torch.no_grad()
def _solve(
    b_BTHK: Tensor,
    kbar_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    ridge: float,
    window_size: int | None,
    num_iterations: int | None,
    tolerance: float,
) -> Tensor:
    """Solve A_i x_i = b_i with the matrices of (16); contiguous `[B, T, H, K]`."""
    b_BTHK = b_BTHK.contiguous()
    if num_iterations is None:
        return _solve_directly(b_BTHK, q_BTHK, k_BSGK, cu_seqlens, scale, ridge, window_size)

    attend = _key_products(q_BTHK, k_BSGK, cu_seqlens, scale, window_size).attend

    def apply(x_BTHK: Tensor) -> Tensor:
        return torch.sub(kbar_BTHK, attend(x_BTHK)).add_(x_BTHK, alpha=ridge)

    return conjugate_gradients(apply, b_BTHK, num_iterations, tolerance)


def _solve_directly(
    b_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    ridge: float,
    window_size: int | None,
) -> Tensor:
    """Solve by Cholesky factorization of the matrices of a few queries at a time.

    Letters as in `parallax.eager`: Z = B G, R = H / G, t queries of a tile.
    """
    (batch_size, num_tokens, num_heads, width), num_kv_heads = q_BTHK.shape, k_BSGK.shape[2]
    folded_ZTRK = [
        x.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(0, 1) for x in (b_BTHK, q_BTHK, k_BSGK)
    ]
    b_ZTRK, q_ZTRK, k_ZSK = *folded_ZTRK[:2], folded_ZTRK[2].squeeze(2)
    first_T = _first_keys(num_tokens, cu_seqlens, window_size, q_BTHK.device)
    first_keys, position_S = first_T.tolist(), torch.arange(num_tokens, device=q_BTHK.device)
    x_ZTRK = torch.empty(b_ZTRK.shape, dtype=b_ZTRK.dtype, device=b_ZTRK.device)
    block = max(1, min(64, _DIRECT_ELEMENTS // max(1, batch_size * num_heads * width**2)))
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        keys = slice(first_keys[start], stop)
        hidden_tS = (position_S[keys] > position_S[start:stop, None]) | (
            position_S[keys] < first_T[start:stop, None]
        )
        s_ZtRS = scale * torch.einsum("ztrk,zsk->ztrs", q_ZTRK[:, start:stop], k_ZSK[:, keys])
        p_ZtRS = s_ZtRS.masked_fill_(hidden_tS[:, None], float("-inf")).softmax(-1)
        a_ZtRKK = _covariances(p_ZtRS, k_ZSK[:, keys])
        a_ZtRKK.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, info_ZtR = torch.linalg.cholesky_ex(a_ZtRKK)
        x_ZtRK = torch.cholesky_solve(b_ZTRK[:, start:stop, ..., None], factor).squeeze(-1)
        # NaN, or indefinite by rounding: the caller sees NaN, as that of conjugate gradients does
        x_ZTRK[:, start:stop] = x_ZtRK.masked_fill_(info_ZtR[..., None] != 0, float("nan"))
    x_BTGRK = x_ZTRK.unflatten(0, (batch_size, num_kv_heads)).transpose(1, 2)
    return x_BTGRK.flatten(2, 3).contiguous()


def _covariances(p_ZtRS: Tensor, k_ZSK: Tensor) -> Tensor:
    """Compute Cov_p(k, k) `[Z, t, R, K, K]` by sums over blocks of keys."""
    width = k_ZSK.shape[-1]
    p_ZMS = p_ZtRS.flatten(1, 2)
    # (14): centred keys avoid cancellation; by the first query's mean, as no query may depend on later keys
    centred_ZSK = k_ZSK - p_ZMS[:, :1] @ k_ZSK
    block = max(1, _DIRECT_ELEMENTS // max(1, k_ZSK.shape[0] * width**2))
    second_ZMF = p_ZMS.new_zeros((*p_ZMS.shape[:2], width**2))
    for p_block_ZMS, k_block_ZSK in zip(p_ZMS.split(block, -1), centred_ZSK.split(block, 1), strict=True):
        outer_ZSF = (k_block_ZSK[..., :, None] * k_block_ZSK[..., None, :]).flatten(2)
        second_ZMF.baddbmm_(p_block_ZMS, outer_ZSF)
    mean_ZMK = p_ZMS @ centred_ZSK
    second_ZMKK = second_ZMF.unflatten(-1, (width, width))
    return (second_ZMKK - mean_ZMK[..., :, None] * mean_ZMK[..., None, :]).unflatten(1, p_ZtRS.shape[1:3])


def _first_keys(
    num_tokens: int, cu_seqlens: Tensor | None, window_size: int | None, device: torch.device
) -> Tensor:
    """Return the first key that each query sees `[T]`, int64."""
    position_T = torch.arange(num_tokens, device=device)
    first_T = torch.zeros_like(position_T)
    if cu_seqlens is not None:
        check_bounds(cu_seqlens.tolist(), num_tokens)
        bounds = cu_seqlens.long()
        first_T = bounds[torch.searchsorted(bounds, position_T, right=True) - 1]
    if window_size is not None:
        first_T = torch.maximum(first_T, position_T - (window_size - 1))
    return first_T
