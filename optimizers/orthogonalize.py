"""Iterations that orthogonalize a matrix U S V^T to (nearly) U V^T by matrix products alone.

Both divide the matrix by its Frobenius norm and then apply odd polynomials of degree five to the singular
values:

    X <- Z X,   Z = a I + b R + c R^2,   R = X X^T        so that        s <- a s + b s^3 + c s^5

for every matrix of a batch, on its short side: R is m x m for the shorter dimension m. All m x m products are
symmetric (`optimizers.kernels.symmetric`).

In the Gram form, several steps update m x m matrices only, Q <- Z Q and R <- Z R Z (since X X^T becomes
Z R Z), and X <- Q X follows at the end. Rounding errors of R grow like its small eigenvalues, by the square
of the steps' factors a. The Gram form is therefore restarted, with R = X X^T recomputed, before the product
of the factors a exceeds `MAX_GROWTH`. In fp16, Newton-Schulz takes three steps, restarts, and takes two;
directions at 0.003 of the Frobenius norm are then within 0.005 of the fp32 iteration's. bf16 has eight times
the rounding error: it restarts at every step, and adds a X in fp32.
"""

import math
from collections.abc import Sequence

import torch

from optimizers.kernels.elementwise import multiply
from optimizers.kernels.symmetric import symmetric_product

Coefficients = tuple[float, float, float]

NEWTON_SCHULZ5: Coefficients = (3.4445, -4.7750, 2.0315)

# optimal for singular values from 1e-3 to 1 in five steps, each divided by a safety factor of 1.02
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# converges to one; repeating the last row of POLAR_EXPRESS would leave singular values up to 1.083
POLAR_EXPRESS_TAIL: Coefficients = (1.875, -1.25, 0.375)
POLAR_EXPRESS_SAFETY = 1.02

MAX_GROWTH = 50.0
"""Maximum factor by which small singular values grow between two restarts of the Gram form."""


def newton_schulz5(
    matrices: torch.Tensor,
    num_iterations: int = 5,
    *,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
) -> torch.Tensor:
    """Orthogonalize approximately by the quintic Newton-Schulz iteration.

    Its one polynomial is chosen for fast growth near zero and does not converge to one: after 5 steps,
    singular values that were above 0.003 of the Frobenius norm are in [0.65, 1.25]. Source: Keller Jordan et
    al., "Muon: an optimizer for hidden layers in neural networks", 2024 (kellerjordan.github.io/posts/muon);
    torch.optim.Muon uses the same.

    Args:
        matrices: `[..., rows, cols]`, any floating dtype.
        num_iterations: Number of steps.
        dtype: Dtype of the iteration; None for the input's.
        eps: Lower bound of the Frobenius norm in the division; a zero matrix returns zero.

    Returns:
        `[..., rows, cols]` in the iteration's dtype.
    """
    return _iterate(matrices, [NEWTON_SCHULZ5] * num_iterations, dtype, safety=1.0, eps=eps)


def polar_express(
    matrices: torch.Tensor,
    num_iterations: int = 8,
    *,
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
) -> torch.Tensor:
    """Orthogonalize accurately by Polar Express, whose polynomials are each optimal given those before it.

    After 8 steps, singular values that were above 0.003 of the Frobenius norm are in [0.95, 1.05]. Steps
    after the fifth repeat (1.875, -1.25, 0.375), which converges to one. Source: Amsel et al., "The Polar
    Express", arXiv 2505.16932, with the coefficients of its public implementations (safety factor 1.02,
    cushion 2).

    Args:
        matrices: `[..., rows, cols]`, any floating dtype.
        num_iterations: Number of steps.
        dtype: Dtype of the iteration; None for the input's.
        eps: Lower bound of the Frobenius norm in the division; a zero matrix returns zero.

    Returns:
        `[..., rows, cols]` in the iteration's dtype.
    """
    num_tail = max(num_iterations - len(POLAR_EXPRESS), 0)
    coefficients = [*POLAR_EXPRESS[:num_iterations], *[POLAR_EXPRESS_TAIL] * num_tail]
    return _iterate(matrices, coefficients, dtype, safety=POLAR_EXPRESS_SAFETY, eps=eps)


def _iterate(
    matrices: torch.Tensor,
    coefficients: Sequence[Coefficients],
    dtype: torch.dtype | None,
    *,
    safety: float,
    eps: float,
) -> torch.Tensor:
    rows, cols = matrices.shape[-2:]
    batch = matrices.reshape(math.prod(matrices.shape[:-2]), rows, cols).contiguous()
    # the norm is accumulated in fp32 at least: a 16-bit sum of millions of squares stagnates
    norm_dtype = torch.promote_types(batch.dtype, torch.float32)
    norm = torch.linalg.vector_norm(batch, dim=(-2, -1), dtype=norm_dtype)
    x = multiply(batch, (norm * safety).clamp(min=eps).reciprocal(), dtype or batch.dtype)
    for steps in split_at_restarts(coefficients, 0.0 if x.dtype == torch.bfloat16 else MAX_GROWTH):
        x = _apply_steps(x, steps)
    return x.reshape(matrices.shape)


def split_at_restarts(coefficients: Sequence[Coefficients], max_growth: float) -> list[list[Coefficients]]:
    """Split steps at the restarts of the Gram form, so that the product of a in each part is bounded.

    Args:
        coefficients: (a, b, c) of each step.
        max_growth: Upper bound of the product; a single step may exceed it.

    Returns:
        The parts, each with at least one step.
    """
    parts: list[list[Coefficients]] = []
    growth = math.inf
    for step in coefficients:
        if growth * step[0] > max_growth:
            parts.append([])
            growth = 1.0
        parts[-1].append(step)
        growth *= step[0]
    return parts


def _apply_steps(x: torch.Tensor, steps: Sequence[Coefficients]) -> torch.Tensor:
    """Apply the steps between two restarts to `[n, rows, cols]`."""
    is_tall = x.shape[1] > x.shape[2]
    r = symmetric_product(x, x, is_tall=is_tall)
    if len(steps) == 1:
        a, b, c = steps[0]
        z = symmetric_product(r, r, alpha=c, c=r, beta=b)
        return torch.baddbmm(x, x, z, beta=a) if is_tall else torch.baddbmm(x, z, x, beta=a)
    q = None
    for i, (a, b, c) in enumerate(steps):
        z = symmetric_product(r, r, alpha=c, c=r, beta=b, diagonal=a)
        q = z if q is None else symmetric_product(z, q)
        if i + 1 < len(steps):
            r = symmetric_product(z, symmetric_product(z, r))
    assert q is not None
    return torch.bmm(x, q) if is_tall else torch.bmm(q, x)
