"""MesaNet's recurrence (von Oswald et al. 2025, arXiv 2506.05233): ridge regression of values on keys.

With L2-normalized q and k, decays exp(g), weights beta and a ridge per key channel:

    A_t = exp(g_t) A_{t-1} + beta_t k_t k_t^T,    S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T,
    o_t = S_t^T x_t,    (A_t + diag(ridge)) x_t = q_t,

with x computed by conjugate gradients (Hestenes and Stiefel 1952) in a fixed number of iterations: without
data-dependent control flow, so that it can be captured in a CUDA graph. Letters: as in chunks.py, J = 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.attention.recurrent.chunks import l2_normalize, merge_chunks
from models.attention.recurrent.state_space import chunk_outputs, initial_states, make_decayed_chunks


def _solve(apply: Callable[[Tensor], Tensor], b: Tensor, num_iterations: int) -> Tensor:
    """Solve A x = b for every row of b by conjugate gradients, with A symmetric and positive definite.

    A row is no longer updated once its residual is at rounding error.
    """
    x = torch.zeros_like(b)
    residual, direction = b, b
    square = (b * b).sum(-1, keepdim=True)
    tolerance = square * (4 * torch.finfo(b.dtype).eps) ** 2
    for _ in range(num_iterations):
        is_active = square > tolerance
        image = apply(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(is_active, square / curvature, 0.0)
        x = x + step * direction
        residual = residual - step * image
        new_square = torch.where(is_active, (residual * residual).sum(-1, keepdim=True), square)
        direction = residual + torch.where(is_active, new_square / square, 0.0) * direction
        square = new_square
    return x


class _ImplicitSolution(torch.autograd.Function):
    """The solution x of A x = b as a differentiable function of the residual b - A x.

    By the implicit function theorem the residual's gradient is the solution of the same system with x's
    gradient on the right-hand side; A and b receive theirs through the residual.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore [bad-override]
        if torch.is_grad_enabled():
            raise NotImplementedError("MesaNet's solver has no second derivative; omit create_graph=True")
        with torch.no_grad():
            return ctx.solve(dx.contiguous()), None, None


def mesa(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    ridge_HK: Tensor,
    num_iterations: int,
    *,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute the recurrence over rows, chunk by chunk, from zero states, in at least fp32.

    Differentiable once, by implicit differentiation: the backward solves one more system with A.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, not normalized yet.
        k_BTHK: Keys, likewise.
        v_BTHK: Values `[B, T, H, K]`.
        g_BTH: Logarithm of the decay `[B, T, H]`, at most 0.
        beta_BTH: Weight of a token `[B, T, H]`, 0 to 1.
        ridge_HK: Ridge per key channel `[H, K]`, positive.
        num_iterations: Iterations of conjugate gradients.
        cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1: the states are reset at each; None for B
            rows of one document each.

    Returns:
        Output `[B, T, H, K]` in v's dtype, and the states A and S `[B, H, K, K]` after the last token.
    """
    chunks, decays = make_decayed_chunks(g_BTH, cu_seqlens)
    q, k = chunks.split(l2_normalize(q_BTHK)), chunks.split(l2_normalize(k_BTHK))
    v, beta = chunks.split(v_BTHK), chunks.split(beta_BTH).unsqueeze(-1)
    ridge = ridge_HK.to(q.dtype)[:, None, None]
    key_states, last_key_state = initial_states(k, beta * k, decays)
    value_states, last_value_state = initial_states(k, beta * v, decays)

    def apply(x: Tensor) -> Tensor:
        return chunk_outputs(x, k, beta * k, key_states, decays) + ridge * x

    def solve(b: Tensor) -> Tensor:
        return _solve(apply, b, num_iterations)

    with torch.no_grad():
        solution = solve(q)
    x = _ImplicitSolution.apply(q - apply(solution), solution, solve)
    o_BTHK = merge_chunks(chunk_outputs(x, k, beta * v, value_states, decays), q_BTHK.shape[1])
    return o_BTHK.to(v_BTHK.dtype), (last_key_state, last_value_state)


def mesa_steps(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    ridge_HK: Tensor,
    num_iterations: int,
    *,
    states: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute the recurrence token by token from given states.

    Args:
        q_BTHK: Queries, as the next six as in mesa.
        k_BTHK: Keys.
        v_BTHK: Values.
        g_BTH: Logarithm of the decay.
        beta_BTH: Weight of a token.
        ridge_HK: Ridge per key channel.
        num_iterations: Iterations of conjugate gradients.
        states: A and S `[B, H, K, K]`, at least fp32; not modified.

    Returns:
        As mesa.
    """
    key_state, value_state = states
    q, k = (l2_normalize(x).to(key_state.dtype) for x in (q_BTHK, k_BTHK))
    v, decay, beta, ridge = (x.to(key_state.dtype) for x in (v_BTHK, g_BTH.exp(), beta_BTH, ridge_HK))
    outputs = []
    for t in range(q.shape[1]):
        weighted_key = (beta[:, t].unsqueeze(-1) * k[:, t]).unsqueeze(-1)
        decay_t = decay[:, t, :, None, None]
        key_state = decay_t * key_state + weighted_key * k[:, t].unsqueeze(2)
        value_state = decay_t * value_state + weighted_key * v[:, t].unsqueeze(2)

        def apply(x_BHK: Tensor, key_state: Tensor = key_state) -> Tensor:
            return (key_state * x_BHK.unsqueeze(2)).sum(-1) + ridge * x_BHK

        x_BHK = _solve(apply, q[:, t], num_iterations)
        outputs.append((x_BHK.unsqueeze(-1) * value_state).sum(2))
    return torch.stack(outputs, dim=1).to(v_BTHK.dtype), (key_state, value_state)
