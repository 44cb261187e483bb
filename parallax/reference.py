"""The mathematics of Parallax attention, once, in plain PyTorch: the oracle of every other implementation.

Source: "Parallax: Parameterized Local Linear Attention for Language Modeling" (arXiv 2605.29157) for (1) to
(6); the gradients (7) to (11) and the invariances (12) to (14) follow from them as shown.

Letters: B batch, T query tokens, S key tokens, H query heads, G key/value heads, K head width.

Definition. Query i sees the keys j <= i of its own document, at most `window_size` of them; every sum below
runs over those. q_i is its query, r_i its probe, and with scale = 1 / sqrt(K) unless given,

    (1)  s_ij   = scale q_i.k_j        lse_i = log sum_j exp(s_ij)        p_ij = exp(s_ij - lse_i)
    (2)  t_ij   = r_i.k_j  (without the scale)                            tbar_i = sum_j p_ij t_ij
    (3)  vbar_i = sum_j p_ij v_j       kbar_i = sum_j p_ij k_j
    (4)  o_i    = vbar_i - Sigma_i r_i,  Sigma_i = sum_j p_ij (v_j - vbar_i)(k_j - kbar_i)^T
    (5)         = sum_j w_ij v_j,        w_ij = p_ij (1 + tbar_i - t_ij)

(5) from (4): Sigma_i r_i = sum_j p_ij (v_j - vbar_i)(t_ij - tbar_i), and sum_j p_ij (t_ij - tbar_i) = 0
removes vbar_i. Each row of w sums to one, but single weights may be negative or exceed one. r = 0 gives
softmax attention.

Streaming form. With a running maximum m_i of s_ij, P1 = exp(s - m_i) and P2 = P1 t, one pass over the keys
collects

    (6)  d1 = sum_j P1,  d2 = sum_j P2,  O1 = sum_j P1 v_j,  O2 = sum_j P2 v_j;
         tbar = d2 / d1,  lse = m + log d1,  vbar = O1 / d1,  o = vbar (1 + tbar) - O2 / d1,

and all four take the same factor when m moves.

Gradients. Given dO, let L = sum_i dO_i.o_i and, per row,

    (7)  a_ij = dO_i.v_j,   b_i = sum_j p_ij a_ij = dO_i.vbar_i,   T_i = sum_j w_ij a_ij = dO_i.o_i.

From (5), t_ij enters through w_ij and through tbar_i:

    (8)  U_ij = dL/dt_ij = p_ij b_i - p_ij a_ij = -p_ij (a_ij - b_i).

The derivative by a free p_ij, g_ij = a_ij (1 + tbar_i - t_ij) + b_i t_ij, has the mean
sum_j p_ij g_ij = T_i + b_i tbar_i. The softmax turns it into the derivative by the logit s_ij:

    (9)  G_ij = dL/ds_ij = p_ij (g_ij - sum_l p_il g_il) = w_ij (a_ij - b_i) + p_ij (b_i - T_i).

The rest is linear. As matrices over (i, j),

    (10) dQ = scale G K       dR = U K
    (11) dK = scale G^T Q + U^T R       dV = w^T dO,

summed over the H / G query heads that read one key/value head. A backward pass needs lse and tbar of the
forward, and b and T, which are row sums of (7).

Numerics. Three exact invariances, each worth digits in 16 bits:

    (12) t_ij -> t_ij - c_i changes neither w nor any gradient: centre t before it is rounded, c_i near tbar_i
         and formed from visible keys only; (6) then gives tbar = c + d2 / d1 and no longer subtracts two
         large terms.
    (13) sum_j G_ij = 0 and sum_j U_ij = 0. So dQ_i = scale (sum_j G_ij k_j - (sum_j G_ij) k_ref) for any
         vector k_ref, and dR_i likewise. With G and U rounded to 16 bits their row sums are no longer zero,
         and row sum times k_ref, with k_ref the mean key, is just the error that the common part of the keys
         would cause.
    (14) k_j -> k_j + n for all j changes neither o nor any gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceResult(NamedTuple):
    """What the forward pass computes per query row.

    Attributes:
        o: Output `[B, T, H, K]`, (5).
        lse: Natural logarithm of the softmax denominator `[B, T, H]`, (1).
        tbar: Mean probe score `[B, T, H]`, (2).
        vbar: Softmax attention `[B, T, H, K]`, (3).
    """

    o: Tensor
    lse: Tensor
    tbar: Tensor
    vbar: Tensor


def parallax_reference_stats(
    q_BTHK: Tensor,
    r_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
) -> ReferenceResult:
    """Compute Parallax attention and its row statistics densely, in the dtype of the inputs.

    Nothing is promoted: 16-bit inputs give the plain 16-bit computation that error budgets are measured with.
    Memory is O(B H T S). Differentiable by autograd, any order.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, any floating dtype.
        r_BTHK: Probes `[B, T, H, K]`.
        k_BSGK: Keys `[B, S, G, K]`, S == T; query head h reads key/value head h // (H / G).
        v_BSGK: Values `[B, S, G, K]`.
        scale: Factor of q.k alone; None for 1 / sqrt(K).
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T, batch 1; documents may be empty. None: one
            document per batch row.
        window_size: Number of newest keys that a query sees, its own included; None for all.

    Returns:
        `o [B, T, H, K]`, `lse [B, T, H]`, `tbar [B, T, H]`, `vbar [B, T, H, K]` by (1) to (5).
    """
    num_groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    k_BSHK = k_BSGK.repeat_interleave(num_groups, dim=2)
    v_BSHK = v_BSGK.repeat_interleave(num_groups, dim=2)
    hidden_TS = ~visible_keys(q_BTHK.shape[1], q_BTHK.device, cu_seqlens=cu_seqlens, window_size=window_size)

    s_BHTS = scale * torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK)
    s_BHTS = s_BHTS.masked_fill(hidden_TS, float("-inf"))
    t_BHTS = torch.einsum("bthk,bshk->bhts", r_BTHK, k_BSHK).masked_fill(hidden_TS, 0.0)
    p_BHTS = s_BHTS.softmax(-1)
    tbar_BHT = (p_BHTS * t_BHTS).sum(-1)
    # tbar - t first: a row with one visible key then has the weight 1 exactly
    w_BHTS = p_BHTS * (1 + (tbar_BHT[..., None] - t_BHTS))
    return ReferenceResult(
        o=torch.einsum("bhts,bshk->bthk", w_BHTS, v_BSHK),
        lse=s_BHTS.logsumexp(-1).transpose(1, 2),
        tbar=tbar_BHT.transpose(1, 2),
        vbar=torch.einsum("bhts,bshk->bthk", p_BHTS, v_BSHK),
    )


def parallax_reference(
    q_BTHK: Tensor,
    r_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
) -> Tensor:
    """Compute Parallax attention densely: `parallax_reference_stats` without the statistics.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, any floating dtype.
        r_BTHK: Probes `[B, T, H, K]`.
        k_BSGK: Keys `[B, S, G, K]`, S == T; query head h reads key/value head h // (H / G).
        v_BSGK: Values `[B, S, G, K]`.
        scale: Factor of q.k alone; None for 1 / sqrt(K).
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T, batch 1; None: one document per batch row.
        window_size: Number of newest keys that a query sees, its own included; None for all.

    Returns:
        Output `[B, T, H, K]` in the dtype of the inputs, (5).
    """
    return parallax_reference_stats(
        q_BTHK, r_BTHK, k_BSGK, v_BSGK, scale=scale, cu_seqlens=cu_seqlens, window_size=window_size
    ).o


def visible_keys(
    num_tokens: int,
    device: torch.device | str = "cpu",
    *,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
) -> Tensor:
    """Return which keys each query sees.

    Args:
        num_tokens: T == S.
        device: Where to build the mask.
        cu_seqlens: Document bounds `[N + 1]` int32, or None for one document.
        window_size: Number of newest keys that a query sees, its own included; None for all.

    Returns:
        Boolean `[T, S]`, true where query i sees key j.
    """
    position_T = torch.arange(num_tokens, device=device)
    age_TS = position_T[:, None] - position_T
    visible_TS = age_TS >= 0
    if window_size is not None:
        visible_TS = visible_TS & (age_TS < window_size)
    if cu_seqlens is not None:
        document_T = torch.searchsorted(cu_seqlens.long(), position_T, right=True)
        visible_TS = visible_TS & (document_T[:, None] == document_T)
    return visible_TS
