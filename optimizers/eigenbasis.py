"""Bases of eigenvectors of X X^T: from scratch, and refreshed by a power iteration."""

import torch
from torch import Tensor


def eigenbasis(matrix: Tensor) -> Tensor:
    """Return eigenvectors of X X^T as columns, largest eigenvalue first; computed in fp64.

    The null space, of which any basis would do, has the one that Gram-Schmidt makes of as many vectors of the
    standard basis, the first ones that are not in the column space. Without it, rounding would choose the
    basis, and runs on different numbers of ranks would differ from their first steps on. It still does where
    these vectors and the column space are dependent, as for equal first rows with nothing but zeros below.

    Args:
        matrix: X, `[rows, cols]`, fp32 or fp64, without NaN and Inf.

    Returns:
        An orthogonal matrix `[rows, rows]` in X's dtype.
    """
    rows = len(matrix)
    values, vectors = torch.linalg.eigh(matrix.double() @ matrix.double().T)
    values, vectors = values.flip(0), vectors.flip(1)
    # singular values of X are known to its own precision; these are their squares
    noise = (rows * torch.finfo(matrix.dtype).eps) ** 2 + rows * torch.finfo(torch.float64).eps
    is_null = values <= noise * values[0]
    # squared norms of projections onto the null space: their sum is its dimension, so that enough are large
    outside = 1.0 - vectors.masked_fill(is_null, 0.0).square().sum(1)
    # of the standard basis, the first such vectors into the place of the last eigenvectors
    standard = torch.eye(rows, dtype=torch.float64, device=matrix.device)
    standard = standard[:, (outside < 1e-6).int().argsort(stable=True)]
    order = (is_null.cumsum(0) - 1).clamp(min=0)
    return torch.linalg.qr(torch.where(is_null, standard[:, order], vectors))[0].to(matrix.dtype)


def refresh_basis(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis after one step of orthogonal iteration towards the eigenvectors of a factor.

    Args:
        factor: Symmetric and positive semi-definite, `[n, n]`.
        basis: Orthogonal, `[n, n]`.

    Returns:
        The new basis `[n, n]`, and the order `[n]` of the old one's columns in it: by their Rayleigh
        quotients, the largest first.
    """
    product = factor @ basis
    order = (basis * product).sum(0).argsort(descending=True, stable=True)
    return torch.linalg.qr(product.index_select(1, order))[0], order
