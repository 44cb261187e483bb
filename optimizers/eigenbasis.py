"""Bases of eigenvectors of X X^T: from scratch, and refreshed by a power iteration."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_BLOCK = 128
"""Columns that are orthonormalized at a time."""

_EPS, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny


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
    noise = (rows * torch.finfo(matrix.dtype).eps) ** 2 + rows * _EPS
    is_null = values <= noise * values[0]
    # squared norms of projections onto the null space: their sum is its dimension, so that enough are large
    outside = 1.0 - vectors.masked_fill(is_null, 0.0).square().sum(1)
    # of the standard basis, the first such vectors into the place of the last eigenvectors
    standard = torch.eye(rows, dtype=torch.float64, device=matrix.device)
    standard = standard[:, (outside < 1e-6).int().argsort(stable=True)]
    order = (is_null.cumsum(0) - 1).clamp(min=0)
    return torch.linalg.qr(torch.where(is_null, standard[:, order], vectors))[0].to(matrix.dtype)


def refresh_bases(factors: Tensor, bases: Tensor) -> tuple[Tensor, Tensor]:
    """Return bases after one step of orthogonal iteration towards the eigenvectors of factors.

    Args:
        factors: Symmetric and positive semi-definite, `[N, n, n]`.
        bases: Orthogonal, `[N, n, n]`.

    Returns:
        The new bases `[N, n, n]`, and the order `[N, n]` of the old ones' columns in them: by their Rayleigh
        quotients, the largest first.
    """
    products = factors @ bases
    orders = (bases * products).sum(-2).argsort(descending=True, stable=True)
    products = products.take_along_dim(orders.unsqueeze(-2), -1)
    return orthonormalize(products) if products.is_cuda else torch.linalg.qr(products)[0], orders


def orthonormalize(matrices: Tensor) -> Tensor:
    """Return Q of matrices' QR decompositions but for the signs of columns, by products in fp64.

    On a GPU torch.linalg.qr takes one matrix after another and reflects column after column. This is block
    Gram-Schmidt, each block of columns three times: what lies in the blocks before it is subtracted, and
    X <- X R^-1 for the Cholesky decomposition R^T R of X^T X, the first time shifted, so that there is one
    (Fukaya et al., arXiv 1809.11085). A matrix for which there is none, as with a column of zeros, goes
    through torch.linalg.qr; the host waits for the device to know.

    Args:
        matrices: `[N, n, n]`, fp32 or fp64.

    Returns:
        Orthogonal matrices `[N, n, n]` in the dtype of the matrices.
    """
    columns = matrices.to(torch.float64, copy=True)
    for start in range(0, columns.shape[-1], _BLOCK):
        block, before = columns[..., start : start + _BLOCK], columns[..., :start]
        for is_first in (True, False, False):
            block = normalize(block - before @ (before.mT @ block), dim=-2, eps=_TINY)
            gram = block.mT @ block
            if is_first:
                # of the article, with the largest sum of a row for the squared norm of X
                terms = sum(block.shape[-2:]) + 1
                shift = 11.0 * block.shape[-1] * terms * (_EPS / 2.0) * gram.abs().sum(-2).amax(-1)
                gram.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
            factor = torch.linalg.cholesky_ex(gram, upper=True).L
            block = torch.linalg.solve_triangular(factor, block, upper=True, left=False)
        columns[..., start : start + _BLOCK] = block
    identity = torch.eye(columns.shape[-1], dtype=columns.dtype, device=columns.device)
    is_lost = ~((columns.mT @ columns - identity).abs().amax((-2, -1)) < 1e-9)
    result = columns.to(matrices.dtype)
    if is_lost.any():
        result[is_lost] = torch.linalg.qr(matrices[is_lost])[0]
    return result
