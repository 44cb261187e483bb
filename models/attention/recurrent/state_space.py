"""The state space recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060).

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t

Mamba-2's names of q, k, v and g are C, B, dt x and dt A. Letters: as in chunks.py, J = 1.
"""

import torch
from torch import Tensor

from models.attention.recurrent.chunks import (
    Chunks,
    Decays,
    cumulative_decays,
    decayed_scores,
    make_chunks,
    merge_chunks,
)

CHUNK_TOKENS = 64


def initial_states(k_BHNCK: Tensor, v_BHNCV: Tensor, decays: Decays) -> tuple[Tensor, Tensor]:
    """Compute every chunk's initial state, `[B, H, N, K, V]`, and the row's final state, `[B, H, K, V]`."""
    added_BHNKV = (decays.to_end_BHNCJ * k_BHNCK).mT @ v_BHNCV
    state_BHKV = torch.zeros_like(added_BHNKV[:, :, 0])
    states = []
    for n in range(added_BHNKV.shape[2]):
        states.append(state_BHKV)
        state_BHKV = decays.across_BHNJ[:, :, n].unsqueeze(-1) * state_BHKV + added_BHNKV[:, :, n]
    return torch.stack(states, dim=2), state_BHKV


def chunk_outputs(
    q_BHNCK: Tensor, k_BHNCK: Tensor, v_BHNCV: Tensor, states_BHNKV: Tensor, decays: Decays
) -> Tensor:
    """Compute the outputs `[B, H, N, C, V]` from the chunks' tokens and their initial states."""
    within = decayed_scores(q_BHNCK, k_BHNCK, decays) @ v_BHNCV
    return within + (decays.from_start_BHNCJ * q_BHNCK) @ states_BHNKV


def make_decayed_chunks(g_BTH: Tensor, cu_seqlens: Tensor | None) -> tuple[Chunks, Decays]:
    """Compute the chunks of a row and the cumulative decays in them."""
    chunks = make_chunks(g_BTH, cu_seqlens, CHUNK_TOKENS)
    return chunks, cumulative_decays(chunks.split(g_BTH).unsqueeze(-1), chunks)


def state_space(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, *, cu_seqlens: Tensor | None
) -> tuple[Tensor, tuple[Tensor]]:
    """Compute the recurrence over rows, chunk by chunk, from zero states; differentiable, in at least fp32.

    Args:
        q_BTHK: Queries `[B, T, H, K]`.
        k_BTHK: Keys `[B, T, H, K]`.
        v_BTHV: Values `[B, T, H, V]`.
        g_BTH: Logarithm of the decay `[B, T, H]`, at most 0.
        cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1: the state is reset at each; None for B
            rows of one document each.

    Returns:
        Output `[B, T, H, V]` in v's dtype, and the state `[B, H, K, V]` after the last token.
    """
    chunks, decays = make_decayed_chunks(g_BTH, cu_seqlens)
    q, k, v = (chunks.split(x) for x in (q_BTHK, k_BTHK, v_BTHV))
    states_BHNKV, last_BHKV = initial_states(k, v, decays)
    o_BTHV = merge_chunks(chunk_outputs(q, k, v, states_BHNKV, decays), g_BTH.shape[1])
    return o_BTHV.to(v_BTHV.dtype), (last_BHKV,)


def state_space_steps(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, *, states: tuple[Tensor]
) -> tuple[Tensor, tuple[Tensor]]:
    """Compute the recurrence token by token from given states.

    Args:
        q_BTHK: Queries, as the next three as in state_space.
        k_BTHK: Keys.
        v_BTHV: Values.
        g_BTH: Logarithm of the decay.
        states: The state `[B, H, K, V]`, at least fp32; not modified.

    Returns:
        As state_space.
    """
    (state_BHKV,) = states
    q, k, v, decay = (x.to(state_BHKV.dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH.exp()))
    outputs = []
    for t in range(q.shape[1]):
        state_BHKV = decay[:, t, :, None, None] * state_BHKV + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(2)
        outputs.append((q[:, t].unsqueeze(-1) * state_BHKV).sum(2))
    return torch.stack(outputs, dim=1).to(v_BTHV.dtype), (state_BHKV,)
