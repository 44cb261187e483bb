"""Conjugate gradients for many independent systems at once (Hestenes and Stiefel 1952)."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor, num_iterations: int) -> Tensor:
    """Solve A x = b for every row of b, each with its own symmetric positive definite A.

    A row whose residual has fallen to rounding stays as it is, so that no row depends on the others, however
    many iterations those take; the loop ends with the last row.

    Args:
        apply: Maps x to A x, both of b's shape; must treat the rows independently.
        b: Right-hand sides `[..., K]`, fp32/fp64.
        num_iterations: The most iterations, at least 1; K of them are exact but for rounding.

    Returns:
        x, shape and dtype of b.
    """
    # in place and fused where torch can: on a GPU each pass over memory counts beside a product
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b
    square = torch.linalg.vector_norm(b, dim=-1, keepdim=True).square_()
    # a residual of a few roundings: further steps would divide noise by noise
    enough = square * (4 * torch.finfo(b.dtype).eps) ** 2
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
