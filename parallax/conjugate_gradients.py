"""Conjugate gradients for many independent systems at once (Hestenes and Stiefel 1952)."""

from collections.abc import Callable

import torch
from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]
"""x -> A x, of one shape, each row with its own A."""


def residual_tolerance(*dtypes: torch.dtype) -> float:
    """Return the relative residual that is small enough for inputs of these dtypes, the least exact's.

    For fp32 and fp64 a few roundings: further steps would divide noise by noise. For bf16 and fp16 eps / 64:
    a residual is an error of b, and rounding the inputs has put one up to 32 times as large there already.

    Args:
        dtypes: Of what makes the matrices and right-hand sides, as the caller gave it, before any promotion.

    Returns:
        Norm of the residual over that of the right-hand side.
    """
    return max(torch.finfo(dtype).eps * (1 / 64 if dtype.itemsize == 2 else 4) for dtype in dtypes)


def conjugate_gradients(apply: LinearMap, b: Tensor, num_iterations: int, tolerance: float) -> Tensor:
    """Solve A x = b for every row of b, each with its own symmetric positive definite A.

    A row whose residual is small enough stays as it is, so that no row depends on the others, however many
    iterations those take; the loop ends with the last row.

    Args:
        apply: Maps x to A x, both of b's shape; must treat the rows independently.
        b: Right-hand sides `[..., K]`, fp32/fp64.
        num_iterations: The most iterations, at least 1; K of them are exact but for rounding.
        tolerance: Norm of the residual over that of b at which a row stops, from `residual_tolerance`.

    Returns:
        x, shape and dtype of b.
    """
    # in place and fused where torch can: on a GPU each pass over memory counts beside a product
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b
    square = torch.linalg.vector_norm(b, dim=-1, keepdim=True).square_()
    enough = square * tolerance**2
    for _ in range(num_iterations):
        is_active = square > enough
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
