"""On request: alignments of the correction and of the probe, and condition numbers, from covariances per row.

Each query row has its own covariance matrices under its softmax weights, K x K, which are summed over blocks
of keys. Equations are those of parallax/reference.py; letters as in row_statistics.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from eval.diagnostics.row_statistics import PIECE_ELEMENTS, pieces, softmax_rows, visible_mask


class RowCovariance(NamedTuple):
    """Means and covariances of each row's visible keys and values under its softmax weights.

    Attributes:
        kbar_BNMK: Mean key.
        vbar_BNMK: Mean value, the output of softmax attention.
        kk_BNMKK: Cov_p(k, k).
        vk_BNMKK: Sigma_KV of (4).
    """

    kbar_BNMK: Tensor
    vbar_BNMK: Tensor
    kk_BNMKK: Tensor
    vk_BNMKK: Tensor


def row_covariance(p_BNMT: Tensor, k_BTK: Tensor, v_BTK: Tensor) -> RowCovariance:
    """Compute means and covariances of keys and values under weights.

    Args:
        p_BNMT: Weights, each row of sum 1.
        k_BTK: Keys of one head.
        v_BTK: Values of one head.
    """
    # a common part of all keys or values changes no covariance, and costs digits
    k0_BTK, v0_BTK = k_BTK - k_BTK.mean(1, keepdim=True), v_BTK - v_BTK.mean(1, keepdim=True)
    kbar, vbar = (torch.einsum("bnmt,btk->bnmk", p_BNMT, x) for x in (k0_BTK, v0_BTK))
    num_rows, num_keys, width = k_BTK.shape
    size = max(1, PIECE_ELEMENTS // (num_rows * width**2))
    sums = [p_BNMT.new_zeros(*p_BNMT.shape[:3], width, width) for _ in range(2)]
    for start in range(0, num_keys, size):
        block = slice(start, start + size)
        for total, left_BTK in zip(sums, (k0_BTK, v0_BTK), strict=True):
            products_BTKL = left_BTK[:, block, :, None] * k0_BTK[:, block, None, :]
            total += torch.einsum("bnmt,btkl->bnmkl", p_BNMT[..., block], products_BTKL)
    kk, vk = (
        total - left[..., :, None] * kbar[..., None, :]
        for total, left in zip(sums, (kbar, vbar), strict=True)
    )
    return RowCovariance(kbar + k_BTK.mean(1)[:, None, None], vbar + v_BTK.mean(1)[:, None, None], kk, vk)


def solved_probe(covariance: RowCovariance, q_BNMK: Tensor, ridge: float) -> Tensor:
    """Solve (16): the probe of exact local linear attention, `[B, N, M, K]`."""
    identity = torch.eye(q_BNMK.shape[-1], dtype=q_BNMK.dtype, device=q_BNMK.device)
    return torch.linalg.solve(covariance.kk_BNMKK + ridge * identity, covariance.kbar_BNMK - q_BNMK)


def covariance_statistics(
    q_BNHK: Tensor,
    r_BNHK: Tensor | None,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    query_BN: Tensor,
    first_BN: Tensor,
    *,
    ridge: float,
    scale: float | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute the quantities that need covariances, in the dtype of the inputs, which should be fp64.

    Args:
        q_BNHK: Queries.
        r_BNHK: Probes; None for attention without one.
        k_BTGK: Keys.
        v_BTGK: Values.
        query_BN: Position of each query among the keys, int64.
        first_BN: Position of the first key that it sees, int64.
        ridge: Ridge of exact local linear attention, per unit of kernel mass.
        scale: Factor of q.k alone; None for 1 / sqrt(K).

    Returns:
        Name -> `[B, N, H]`, and the solved probes `[B, N, H, K]`. key_condition_number is that of
        Cov_p(k, k) + ridge. With probes: correction_alignment, the cosine of Sigma r and vbar;
        probe_alignment, that of r and the solved probe; covariance_alignment, |Sigma r| / (|Sigma|_F |r|),
        which is 1 where Sigma has rank 1 along r, and 1 / sqrt(K) in the root mean square over all directions
        of r. A row with one visible key has no covariance: NaN.
    """
    num_groups, width = q_BNHK.shape[2] // k_BTGK.shape[2], k_BTGK.shape[3]
    heads, probes = [], []
    for head in range(k_BTGK.shape[2]):
        own = slice(head * num_groups, (head + 1) * num_groups)
        k_BTK, v_BTK = k_BTGK[:, :, head], v_BTGK[:, :, head]
        found, solved = [], []
        for piece in pieces(query_BN, num_groups * max(k_BTGK.shape[1], width**2)):
            visible_BNT = visible_mask(first_BN[:, piece], query_BN[:, piece], k_BTGK.shape[1])
            q_BNMK = q_BNHK[:, piece, own]
            _, p_BNMT = softmax_rows(q_BNMK, k_BTK, visible_BNT, scale)
            covariance = row_covariance(p_BNMT, k_BTK, v_BTK)
            solved.append(solved_probe(covariance, q_BNMK, ridge))
            r_BNMK = None if r_BNHK is None else r_BNHK[:, piece, own]
            one = {"key_condition_number": _condition_number(covariance.kk_BNMKK, ridge)}
            if r_BNMK is not None:
                one |= _alignments(covariance, r_BNMK, solved[-1])
            has_one_key = (visible_BNT.sum(-1) == 1)[..., None]
            found.append({name: x.masked_fill(has_one_key, torch.nan) for name, x in one.items()})
        heads.append({name: torch.cat([each[name] for each in found], 1) for name in found[0]})
        probes.append(torch.cat(solved, 1))
    return {name: torch.cat([each[name] for each in heads], 2) for name in heads[0]}, torch.cat(probes, 2)


def _alignments(covariance: RowCovariance, r_BNMK: Tensor, solved_BNMK: Tensor) -> dict[str, Tensor]:
    correction = torch.einsum("bnmkl,bnml->bnmk", covariance.vk_BNMKK, r_BNMK)
    norms = torch.linalg.matrix_norm(covariance.vk_BNMKK) * r_BNMK.norm(dim=-1)
    return {
        "correction_alignment": torch.cosine_similarity(correction, covariance.vbar_BNMK, dim=-1),
        "probe_alignment": torch.cosine_similarity(r_BNMK, solved_BNMK, dim=-1),
        "covariance_alignment": correction.norm(dim=-1) / norms,
    }


def _condition_number(kk_BNMKK: Tensor, ridge: float) -> Tensor:
    # rounding may leave an eigenvalue of 0 slightly below
    values = torch.linalg.eigvalsh(kk_BNMKK).clamp_min(0.0)
    return (values[..., -1] + ridge) / (values[..., 0] + ridge)
