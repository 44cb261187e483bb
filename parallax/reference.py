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

Without probes (r = None) everything above is softmax attention: t = 0, so w = p, o = vbar, T = b, and

    (9') G_ij = p_ij (a_ij - T_i)       dQ = scale G K       dK = scale G^T Q       dV = p^T dO.

Its rows still sum to zero, so (13) holds for dQ, and (14) for all of it.

Numerics. Three exact invariances, each worth digits in 16 bits:

    (12) t_ij -> t_ij - c_i changes neither w nor any gradient: centre t before it is rounded, c_i near tbar_i
         and formed from visible keys only; (6) then gives tbar = c + d2 / d1 and no longer subtracts two
         large terms.
    (13) sum_j G_ij = 0 and sum_j U_ij = 0. So dQ_i = scale (sum_j G_ij k_j - (sum_j G_ij) k_ref) for any
         vector k_ref, and dR_i likewise. With G and U rounded to 16 bits their row sums are no longer zero,
         and row sum times k_ref, with k_ref the mean key, is just the error that the common part of the keys
         would cause.
    (14) k_j -> k_j + n for all j changes neither o nor any gradient.

The family (the paper's and its predecessor's, arXiv 2510.01450). Exact local linear attention (LLA) fits an
affine map from keys to values around each query by weighted ridge regression, the ridge being per unit of
kernel mass. With m_ij = exp(s_ij) and z_ij = k_j - q_i,

    (15) omega_i = sum_j m_ij,  mu_i = sum_j m_ij z_ij,  S_i = sum_j m_ij z_ij z_ij^T + ridge omega_i I,
         rho_i = S_i^-1 mu_i,   o_i = sum_j m_ij (1 - z_ij.rho_i) v_j / (omega_i - mu_i.rho_i).

It is (4) with a probe that is solved instead of learned:

    (16) A_i r_i = kbar_i - q_i,   A_i = Cov_p(k, k)_i + ridge I.

For S / omega = A + d d^T and mu / omega = d with d = kbar - q; so rho = A^-1 d / (1 + e), e = d.A^-1 d, the
denominator is omega / (1 + e), and o = (1 + e) (vbar - (Cov_p(v, k) + vbar d^T) rho) = vbar - Cov_p(v, k)
A^-1 d. An infinite ridge gives r = 0: softmax attention.

Uniform weights p_ij = 1 / n_i over the n_i keys of the document so far (scale = 0, an infinite bandwidth):

    (17) (3): value average vbar_i;  (4): affine linear attention;  (16): affine MesaNet;
         linear attention, without the intercept: o_i = sum_j (q_i.k_j) v_j / n_i.

Gradient of the solved probe by the implicit rule. Given y_i = A_i^-1 dL/dr_i, differentiating (16) gives
dL = sum_i y_i.(d(kbar_i - q_i) - dA_i r_i). By (4), Cov_p(k, k) r = kbar - o(q, r, k, k), hence

    (18) dL = d sum_i y_i.(o_i(q, r, k, k) - q_i)   with r and y held:

the gradients (9) to (11) of Parallax attention whose values are the keys, for dO = y, and -y for q.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceResult(NamedTuple):
    """What the forward pass computes per query row.

    Attributes:
        o: Output `[B, T, H, K]`, (5).
        lse: Natural logarithm of the softmax denominator `[B, T, H]`, (1).
        tbar: Mean probe score `[B, T, H]`, (2); zeros without probes.
        vbar: Softmax attention `[B, T, H, K]`, (3).
    """

    o: Tensor
    lse: Tensor
    tbar: Tensor
    vbar: Tensor


def parallax_reference_stats(
    q_BTHK: Tensor,
    r_BTHK: Tensor | None,
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
        r_BTHK: Probes `[B, T, H, K]`, or None for softmax attention.
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
    p_BHTS = s_BHTS.softmax(-1)
    lse_BTH = s_BHTS.logsumexp(-1).transpose(1, 2)
    vbar_BTHK = torch.einsum("bhts,bshk->bthk", p_BHTS, v_BSHK)
    if r_BTHK is None:
        return ReferenceResult(vbar_BTHK, lse_BTH, torch.zeros_like(lse_BTH), vbar_BTHK)
    t_BHTS = torch.einsum("bthk,bshk->bhts", r_BTHK, k_BSHK).masked_fill(hidden_TS, 0.0)
    tbar_BHT = (p_BHTS * t_BHTS).sum(-1)
    # tbar - t first: a row with one visible key then has the weight 1 exactly
    w_BHTS = p_BHTS * (1 + (tbar_BHT[..., None] - t_BHTS))
    return ReferenceResult(
        o=torch.einsum("bhts,bshk->bthk", w_BHTS, v_BSHK),
        lse=lse_BTH,
        tbar=tbar_BHT.transpose(1, 2),
        vbar=vbar_BTHK,
    )


def parallax_reference(
    q_BTHK: Tensor,
    r_BTHK: Tensor | None,
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
        r_BTHK: Probes `[B, T, H, K]`, or None for softmax attention.
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
    """Build the mask of the keys that each query sees.

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


def local_linear_reference(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    *,
    ridge: float,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
) -> Tensor:
    """Compute exact local linear attention (15) densely, in the dtype of the inputs.

    Memory is O(B H T S K). Differentiable by autograd, any order.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, fp32/fp64 (the solver's dtypes).
        k_BSGK: Keys `[B, S, G, K]`, S == T.
        v_BSGK: Values `[B, S, G, K]`.
        ridge: Ridge per unit of kernel mass, positive.
        scale: Factor of q.k in the kernel; None for 1 / sqrt(K).
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T, batch 1; None: one document per batch row.
        window_size: Number of newest keys that a query sees, its own included; None for all.

    Returns:
        Output `[B, T, H, K]`.
    """
    k_BSHK, v_BSHK = _for_each_query_head(q_BTHK, k_BSGK, v_BSGK)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    hidden_TS = ~visible_keys(q_BTHK.shape[1], q_BTHK.device, cu_seqlens=cu_seqlens, window_size=window_size)
    s_BTHS = scale * torch.einsum("bthk,bshk->bths", q_BTHK, k_BSHK)
    s_BTHS = s_BTHS.masked_fill(hidden_TS[:, None], float("-inf"))
    # (15) is homogeneous in m: any factor per row cancels
    m_BTHS = (s_BTHS - s_BTHS.amax(-1, keepdim=True).detach()).exp()
    z_BTHSK = k_BSHK.transpose(1, 2)[:, None] - q_BTHK[..., None, :]
    omega_BTH1 = m_BTHS.sum(-1, keepdim=True)
    mu_BTHK = torch.einsum("bths,bthsk->bthk", m_BTHS, z_BTHSK)
    s_BTHKK = torch.einsum("bths,bthsk,bthsl->bthkl", m_BTHS, z_BTHSK, z_BTHSK)
    identity_KK = torch.eye(q_BTHK.shape[-1], dtype=q_BTHK.dtype, device=q_BTHK.device)
    rho_BTHK = torch.linalg.solve(s_BTHKK + ridge * omega_BTH1[..., None] * identity_KK, mu_BTHK)
    weight_BTHS = m_BTHS * (1 - torch.einsum("bthsk,bthk->bths", z_BTHSK, rho_BTHK))
    o_BTHK = torch.einsum("bths,bshk->bthk", weight_BTHS, v_BSHK)
    return o_BTHK / (omega_BTH1 - (mu_BTHK * rho_BTHK).sum(-1, keepdim=True))


def value_average_reference(v_BSGK: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Compute the mean of the values so far (17) densely.

    Args:
        v_BSGK: Values `[B, S, G, K]`, any floating dtype.
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to S, batch 1; None: one document per batch row.

    Returns:
        Means `[B, S, G, K]`.
    """
    return torch.einsum("ts,bsgk->btgk", _uniform_weights(v_BSGK, cu_seqlens), v_BSGK)


def linear_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Compute linear attention (17) densely.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, any floating dtype.
        k_BSGK: Keys `[B, S, G, K]`, S == T.
        v_BSGK: Values `[B, S, G, K]`.
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T, batch 1; None: one document per batch row.

    Returns:
        Output `[B, T, H, K]`.
    """
    k_BSHK, v_BSHK = _for_each_query_head(q_BTHK, k_BSGK, v_BSGK)
    t_BTHS = torch.einsum("bthk,bshk->bths", q_BTHK, k_BSHK)
    p_T1S = _uniform_weights(q_BTHK, cu_seqlens)[:, None]
    return torch.einsum("bths,bshk->bthk", p_T1S * t_BTHS, v_BSHK)


def affine_linear_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Compute affine linear attention densely: (4) with uniform weights, the covariance written out.

    Args:
        q_BTHK: Probes `[B, T, H, K]`, r of (4), any floating dtype.
        k_BSGK: Keys `[B, S, G, K]`, S == T.
        v_BSGK: Values `[B, S, G, K]`.
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T, batch 1; None: one document per batch row.

    Returns:
        Output `[B, T, H, K]`.
    """
    k_BSHK, v_BSHK = _for_each_query_head(q_BTHK, k_BSGK, v_BSGK)
    p_TS = _uniform_weights(q_BTHK, cu_seqlens)
    vbar_BTHK = torch.einsum("ts,bshk->bthk", p_TS, v_BSHK)
    return vbar_BTHK - torch.einsum("bthkl,bthl->bthk", _covariance(p_TS, v_BSHK, k_BSHK), q_BTHK)


def affine_mesanet_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, ridge: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Compute affine MesaNet densely: (4) and (16) with uniform weights, the covariances written out.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, fp32/fp64 (the solver's dtypes).
        k_BSGK: Keys `[B, S, G, K]`, S == T.
        v_BSGK: Values `[B, S, G, K]`.
        ridge: Ridge per unit of kernel mass, positive.
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T, batch 1; None: one document per batch row.

    Returns:
        Output `[B, T, H, K]`.
    """
    k_BSHK, v_BSHK = _for_each_query_head(q_BTHK, k_BSGK, v_BSGK)
    p_TS = _uniform_weights(q_BTHK, cu_seqlens)
    vbar_BTHK, kbar_BTHK = (torch.einsum("ts,bshk->bthk", p_TS, x) for x in (v_BSHK, k_BSHK))
    identity_KK = torch.eye(q_BTHK.shape[-1], dtype=q_BTHK.dtype, device=q_BTHK.device)
    a_BTHKK = _covariance(p_TS, k_BSHK, k_BSHK) + ridge * identity_KK
    r_BTHK = torch.linalg.solve(a_BTHKK, kbar_BTHK - q_BTHK)
    return vbar_BTHK - torch.einsum("bthkl,bthl->bthk", _covariance(p_TS, v_BSHK, k_BSHK), r_BTHK)


def _for_each_query_head(q_BTHK: Tensor, *tensors_BSGK: Tensor) -> tuple[Tensor, ...]:
    num_groups = q_BTHK.shape[2] // tensors_BSGK[0].shape[2]
    return tuple(x.repeat_interleave(num_groups, dim=2) for x in tensors_BSGK)


def _uniform_weights(like_BTHK: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return p_ij = 1 / n_i `[T, S]` of (17)."""
    visible_TS = visible_keys(like_BTHK.shape[1], like_BTHK.device, cu_seqlens=cu_seqlens).to(like_BTHK.dtype)
    return visible_TS / visible_TS.sum(-1, keepdim=True)


def _covariance(p_TS: Tensor, x_BSHK: Tensor, y_BSHK: Tensor) -> Tensor:
    """Return sum_j p_ij (x_j - xbar_i)(y_j - ybar_i)^T `[B, T, H, K, K]`."""
    x_BTSHK, y_BTSHK = (
        x[:, None] - torch.einsum("ts,bshk->bthk", p_TS, x)[:, :, None] for x in (x_BSHK, y_BSHK)
    )
    return torch.einsum("ts,btshk,btshl->bthkl", p_TS, x_BTSHK, y_BTSHK)
