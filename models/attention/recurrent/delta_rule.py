"""The gated delta rule of Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) and KDA (arXiv 2510.26692).

With L2-normalized q and k, a decay exp(g) of the state, and a learning rate beta:

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - (exp(g_t) S_{t-1})^T k_t)^T,    o_t = S_t^T q_t / sqrt(K).

Gated DeltaNet has one g per head, KDA one per key channel; all else is the same. Within a chunk the updates
of the state are the solution of a triangular system (the WY form).

Letters: as in chunks.py.
"""

import torch
from torch import Tensor

from models.attention.recurrent.chunks import (
    cumulative_decays,
    decayed_scores,
    l2_normalize,
    make_chunks,
    merge_chunks,
)

CHUNK_TOKENS = 64
CHUNK_TOKENS_PER_CHANNEL = 16  # smaller: decays per channel take T * C * K elements


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHJ: Tensor,
    beta_BTH: Tensor,
    *,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor]]:
    """Compute the gated delta rule over rows, chunk by chunk, from zero states; differentiable.

    The arithmetic is in at least fp32.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, not normalized yet.
        k_BTHK: Keys, likewise.
        v_BTHV: Values `[B, T, H, V]`.
        g_BTHJ: Logarithm of the decay, at most 0: `[B, T, H, 1]` or `[B, T, H, K]`.
        beta_BTH: Learning rate `[B, T, H]`, 0 to 1.
        cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1: the state is reset at each; None for B
            rows of one document each.

    Returns:
        Output `[B, T, H, V]` in v's dtype, and the state `[B, H, K, V]` after the last token.
    """
    chunk_tokens = CHUNK_TOKENS if g_BTHJ.shape[-1] == 1 else CHUNK_TOKENS_PER_CHANNEL
    chunks = make_chunks(q_BTHK, cu_seqlens, chunk_tokens)
    q, k = chunks.split(l2_normalize(q_BTHK) * q_BTHK.shape[-1] ** -0.5), chunks.split(l2_normalize(k_BTHK))
    v, beta = chunks.split(v_BTHV), chunks.split(beta_BTH).unsqueeze(-1)
    decays = cumulative_decays(chunks.split(g_BTHJ), chunks)
    # the chunk's updates are c = u - w S, with S its initial state
    system = (beta * decayed_scores(k, k, decays)).tril(-1)
    right = beta * torch.cat((v, decays.from_start_BHNCJ * k), dim=-1)
    solution = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solution.split((v.shape[-1], k.shape[-1]), dim=-1)
    scores = decayed_scores(q, k, decays)
    q_from_start, k_to_end = decays.from_start_BHNCJ * q, decays.to_end_BHNCJ * k
    state_BHKV = torch.zeros_like(k[:, :, 0].mT @ v[:, :, 0])
    outputs = []
    for n in range(q.shape[2]):
        c = u[:, :, n] - w[:, :, n] @ state_BHKV
        outputs.append(q_from_start[:, :, n] @ state_BHKV + scores[:, :, n] @ c)
        state_BHKV = decays.across_BHNJ[:, :, n].unsqueeze(-1) * state_BHKV + k_to_end[:, :, n].mT @ c
    o_BTHV = merge_chunks(torch.stack(outputs, dim=2), q_BTHK.shape[1])
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
    """Compute the gated delta rule token by token from given states.

    Args:
        q_BTHK: Queries, as the next four as in gated_delta_rule.
        k_BTHK: Keys.
        v_BTHV: Values.
        g_BTHJ: Logarithm of the decay.
        beta_BTH: Learning rate.
        states: The state `[B, H, K, V]`, at least fp32; not modified.

    Returns:
        As gated_delta_rule.
    """
    (state_BHKV,) = states
    q, k = (l2_normalize(x).to(state_BHKV.dtype) for x in (q_BTHK, k_BTHK))
    v, decay, beta = (x.to(state_BHKV.dtype) for x in (v_BTHV, g_BTHJ.exp(), beta_BTH))
    outputs = []
    for t in range(q.shape[1]):
        state_BHKV = decay[:, t].unsqueeze(-1) * state_BHKV
        predicted_BHV = (k[:, t].unsqueeze(-1) * state_BHKV).sum(2)
        c_BHV = beta[:, t].unsqueeze(-1) * (v[:, t] - predicted_BHV)
        state_BHKV = state_BHKV + k[:, t].unsqueeze(-1) * c_BHV.unsqueeze(2)
        outputs.append((q[:, t].unsqueeze(-1) * state_BHKV).sum(2))
    o_BTHV = torch.stack(outputs, dim=1) * q.shape[-1] ** -0.5
    return o_BTHV.to(v_BTHV.dtype), (state_BHKV,)
