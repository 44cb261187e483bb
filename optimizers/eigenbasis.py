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
    product = product.index_select(1, order)
    return orthonormalize(product) if product.is_cuda else torch.linalg.qr(product)[0], order


def orthonormalize(matrix: Tensor) -> Tensor:
    """Return Q of a matrix's QR decomposition but for the signs of its columns, by products in fp64.

    On a GPU torch.linalg.qr reflects one column after another and takes most of a step with a refresh. This
    is shifted CholeskyQR3 (Fukaya et al., arXiv 1809.11085) of the columns at norm 1: three times X <- X R^-1
    for the Cholesky decomposition R^T R of X^T X, the first time shifted, so that there is one. Where there
    is none, as for columns of zeros, Q is torch.linalg.qr's; the host waits for the device to know.

    Args:
        matrix: `[n, n]`, fp32 or fp64.

    Returns:
        An orthogonal matrix `[n, n]` in the matrix's dtype.
    """
    n = len(matrix)
    columns = torch.nn.functional.normalize(matrix.double(), dim=0, eps=torch.finfo(torch.float64).tiny)
    for i in range(3):
        gram = columns.T @ columns
        if i == 0:
            # of the article, with the largest sum of a row for the squared norm of X
            shift = 11.0 * n * (2 * n + 1) * torch.finfo(torch.float64).eps / 2.0 * gram.abs().sum(0).max()
            gram.diagonal().add_(shift)
        factor = torch.linalg.cholesky_ex(gram, upper=True).L
        columns = torch.linalg.solve_triangular(factor, columns, upper=True, left=False)
    # the last of these products tells whether the decompositions before it were found
    is_found = (gram - torch.eye(n, dtype=gram.dtype, device=gram.device)).abs().max() < 1e-3
    return columns.to(matrix.dtype) if is_found else torch.linalg.qr(matrix)[0]
