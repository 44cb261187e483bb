"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464), and Kimi Delta Attention's (arXiv 2510.26692).

With unit vectors q and k, a decay exp(g) of the state, and a rate beta of its correction:

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - (exp(g_t) S_{t-1})^T k_t)^T,    o_t = S_t^T q_t / sqrt(K).

g is one number a head in Gated DeltaNet and one a key channel in Kimi Delta Attention; all else is the same.
Within a chunk the corrections solve a triangular system (the WY form).

Letters: as in chunks.py.
"""

import torch
from torch import Tensor

from models.attention.recurrent.chunks import cut, fade, fading_scores, join, unit

CHUNK_TOKENS = 64
CHUNK_TOKENS_BY_CHANNEL = 16  # decays between tokens are kept by channel there: T * C * K of them


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHJ: Tensor,
    beta_BTH: Tensor,
    *,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor]]:
    """Run the rule over rows, chunk by chunk, from empty states; differentiable, in at least fp32.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, of any length: they are normalised here.
        k_BTHK: Keys, likewise.
        v_BTHV: Values `[B, T, H, V]`.
        g_BTHJ: Logarithm of the decay, at most 0: `[B, T, H, 1]` or `[B, T, H, K]`.
        beta_BTH: Rate of correction `[B, T, H]`, 0 to 1.
        cu_seqlens: Document bounds `[N + 1]`, int32, with B = 1: the state starts anew in each; None for B
            rows of one document each.

    Returns:
        Output `[B, T, H, V]` in v's dtype, and the state `[B, H, K, V]` after the last token.
    """
    chunks = cut(q_BTHK, cu_seqlens, CHUNK_TOKENS if g_BTHJ.shape[-1] == 1 else CHUNK_TOKENS_BY_CHANNEL)
    q, k = chunks.split(unit(q_BTHK) * q_BTHK.shape[-1] ** -0.5), chunks.split(unit(k_BTHK))
    v, beta = chunks.split(v_BTHV), chunks.split(beta_BTH).unsqueeze(-1)
    decays = fade(chunks.split(g_BTHJ), chunks)
    # corrections c = u - w S, with S as the chunk is handed it
    system = (beta * fading_scores(k, k, decays)).tril(-1)
    right = beta * torch.cat((v, decays.reading_BHNCJ * k), dim=-1)
    solution = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solution.split((v.shape[-1], k.shape[-1]), dim=-1)
    scores, reading, writing = fading_scores(q, k, decays), decays.reading_BHNCJ * q, decays.writing_BHNCJ * k
    state_BHKV = torch.zeros_like(k[:, :, 0].mT @ v[:, :, 0])
    outputs = []
    for n in range(q.shape[2]):
        c = u[:, :, n] - w[:, :, n] @ state_BHKV
        outputs.append(reading[:, :, n] @ state_BHKV + scores[:, :, n] @ c)
        state_BHKV = decays.passing_BHNJ[:, :, n].unsqueeze(-1) * state_BHKV + writing[:, :, n].mT @ c
    o_BTHV = join(torch.stack(outputs, dim=2), q_BTHK.shape[1])
    return o_BTHV.to(v_BTHV.dtype), (state_BHKV,)


def gated_delta_rule_steps(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHJ: Tensor,
    beta_BTH: Tensor,
    *,
    states: tuple[Tensor],
) -> tuple[Tensor, tuple[Tensor]]:
    """Run the rule token by token from given states, as it stands at the top.

    Args:
        q_BTHK: As for gated_delta_rule, like all but the last.
        k_BTHK: Keys.
        v_BTHV: Values.
        g_BTHJ: Logarithm of the decay.
        beta_BTH: Rate of correction.
        states: The state `[B, H, K, V]`, at least fp32; it is left as it is.

    Returns:
        As gated_delta_rule.
    """
    (state_BHKV,) = states
    q, k = (unit(x).to(state_BHKV.dtype) for x in (q_BTHK, k_BTHK))
    v, decay, beta = (x.to(state_BHKV.dtype) for x in (v_BTHV, g_BTHJ.exp(), beta_BTH))
    outputs = []
    for t in range(q.shape[1]):
        state_BHKV = decay[:, t].unsqueeze(-1) * state_BHKV
        seen_BHV = (k[:, t].unsqueeze(-1) * state_BHKV).sum(2)
        c_BHV = beta[:, t].unsqueeze(-1) * (v[:, t] - seen_BHV)
        state_BHKV = state_BHKV + k[:, t].unsqueeze(-1) * c_BHV.unsqueeze(2)
        outputs.append((q[:, t].unsqueeze(-1) * state_BHKV).sum(2))
    o_BTHV = torch.stack(outputs, dim=1) * q.shape[-1] ** -0.5
    return o_BTHV.to(v_BTHV.dtype), (state_BHKV,)
