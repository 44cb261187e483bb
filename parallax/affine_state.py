"""Decode steps of attention with uniform weights, (17) of `parallax.reference`, from running sums.

With n keys every mean is a sum over n: vbar = sum v / n, Cov(v, k) = sum v k^T / n - vbar kbar^T. The sums
are fp32 (fp64 for fp64) and updated in place. Letters as in `parallax.affine`.
"""

import torch
from torch import Tensor

from parallax.conjugate_gradients import conjugate_gradients, residual_tolerance
from parallax.local_linear import promote

Sums = dict[str, Tensor]
"""Running sums of B sequences: v, k `[B, G, K]`; vk, kk `[B, G, K, K]` = sum v k^T, sum k k^T; as needed."""


def add_keys(sums: Sums, k_BTGK: Tensor | None, v_BTGK: Tensor, row: int | slice = slice(None)) -> None:
    """Add the keys and values of new tokens to the sums, in place.

    Args:
        sums: The sums to update.
        k_BTGK: Keys `[B, T, G, K]`; None if no sum needs them.
        v_BTGK: Values `[B, T, G, K]`.
        row: The sequences that the tokens belong to.
    """
    (v,) = promote(v_BTGK)
    if "v" in sums:
        sums["v"][row] += v.sum(1)
    if k_BTGK is None:
        return
    (k,) = promote(k_BTGK)
    if "k" in sums:
        sums["k"][row] += k.sum(1)
    if "vk" in sums:
        sums["vk"][row] += torch.einsum("btgv,btgk->bgvk", v, k)
    if "kk" in sums:
        sums["kk"][row] += torch.einsum("btgv,btgk->bgvk", k, k)


def linear_output(sums: Sums, counts_B: Tensor, q_BHK: Tensor) -> Tensor:
    """Compute linear attention of one query per sequence: sum_j (q.k_j) v_j / n.

    Args:
        sums: Must contain vk.
        counts_B: Number of keys n of each sequence.
        q_BHK: Queries `[B, H, K]`.

    Returns:
        `[B, H, K]`, fp32 (fp64 for fp64).
    """
    q_BGRK = _by_group(q_BHK, sums["vk"].shape[1])
    return torch.einsum("bgvk,bgrk->bgrv", sums["vk"], q_BGRK).flatten(1, 2) / counts_B[:, None, None]


def affine_output(sums: Sums, counts_B: Tensor, r_BHK: Tensor) -> Tensor:
    """Compute affine linear attention of one probe per sequence: vbar - Cov(v, k) r.

    Args:
        sums: Must contain v, k and vk.
        counts_B: Number of keys n of each sequence.
        r_BHK: Probes `[B, H, K]`.

    Returns:
        `[B, H, K]`, fp32 (fp64 for fp64).
    """
    r_BGRK = _by_group(r_BHK, sums["vk"].shape[1])
    n = counts_B[:, None, None, None]
    kbar_BG1K, vbar_BG1K = (sums[name].unsqueeze(2) / n for name in ("k", "v"))
    tbar_BGR1 = (r_BGRK * kbar_BG1K).sum(-1, keepdim=True)
    o_BGRK = vbar_BG1K * (1 + tbar_BGR1) - torch.einsum("bgvk,bgrk->bgrv", sums["vk"], r_BGRK) / n
    return o_BGRK.flatten(1, 2)


def mesanet_output(sums: Sums, counts_B: Tensor, q_BHK: Tensor, ridge: float, num_iterations: int) -> Tensor:
    """Compute affine MesaNet of one query per sequence, whose probe solves (16).

    Args:
        sums: Must contain v, k, vk and kk.
        counts_B: Number of keys n of each sequence.
        q_BHK: Queries `[B, H, K]`.
        ridge: Ridge per key.
        num_iterations: Maximum number of conjugate-gradient iterations.

    Returns:
        `[B, H, K]`, fp32 (fp64 for fp64).
    """
    keys = {"k": sums["k"], "v": sums["k"], "vk": sums["kk"]}
    tolerance = residual_tolerance(q_BHK.dtype)
    (q_BHK,) = promote(q_BHK)
    kbar_BG1K = (sums["k"] / counts_B[:, None, None]).unsqueeze(2)
    kbar_BHK = kbar_BG1K.expand(-1, -1, q_BHK.shape[1] // kbar_BG1K.shape[1], -1).flatten(1, 2)

    def apply(x_BHK: Tensor) -> Tensor:
        return kbar_BHK - affine_output(keys, counts_B, x_BHK) + ridge * x_BHK

    r_BHK = conjugate_gradients(apply, kbar_BHK - q_BHK, num_iterations, tolerance)
    return affine_output(sums, counts_B, r_BHK)


def _by_group(x_BHK: Tensor, num_kv_heads: int) -> Tensor:
    (x,) = promote(x_BHK)
    return x.unflatten(1, (num_kv_heads, -1))
