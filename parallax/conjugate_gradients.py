"""Conjugate gradients for many independent systems at once (Hestenes and Stiefel 1952)."""

from collections.abc import Callable

import torch
from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]
"""Maps x to A x of the same shape, with one matrix A per row."""


def residual_tolerance(*dtypes: torch.dtype) -> float:
    """Return the relative residual at which to stop, that of the least precise of the input dtypes.

    For fp32 and fp64 it is 4 eps: below it the residual is rounding noise. For bf16 and fp16 it is
    eps / 64: a residual is an error of b, and rounding the inputs already causes one up to 32 times as large.

    Args:
        dtypes: Dtypes of the inputs of the matrices and right-hand sides, before any promotion.

    Returns:
        Norm of the residual over that of the right-hand side.
    """
    return max(torch.finfo(dtype).eps * (1 / 64 if dtype.itemsize == 2 else 4) for dtype in dtypes)


def conjugate_gradients(apply: LinearMap, b: Tensor, num_iterations: int, tolerance: float) -> Tensor:
    """Solve A x = b for every row of b, each with its own symmetric positive definite A.

    A row stops changing once its residual is small enough, so the result of a row does not depend on the
    others; the loop ends when all rows have stopped.

    Args:
        apply: Maps x to A x, both of b's shape; must treat the rows independently.
        b: Right-hand sides `[..., K]`, fp32/fp64.
        num_iterations: Maximum number of iterations, at least 1; K are exact up to rounding.
        tolerance: Norm of the residual over that of b at which a row stops, from `residual_tolerance`.

    Returns:
        x, shape and dtype of b.
    """
    # in place and fused where possible: on a GPU a pass over memory costs about as much as a product
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b
    square = torch.linalg.vector_norm(b, dim=-1, keepdim=True).square_()
    threshold = square * tolerance**2
    for _ in range(num_iterations):
        is_active = square > threshold
        if not is_active.any():
            break
        image = apply(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(is_active, square / curvature, 0.0)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        new_square = torch.linalg.vector_norm(residual, dim=-1, keepdim=True).square_()
        new_square = torch.where(is_active, new_square, square)
        ratio = torch.where(is_active, new_square / square, 0.0)
        direction = torch.addcmul(residual, ratio, direction)
        square = new_square
    return x
