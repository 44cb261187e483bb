"""Iterations that replace a matrix U S V^T by (nearly) U V^T with matrix products alone.

Both divide by the Frobenius norm and then apply odd polynomials of degree five to the singular values:

    X <- a X + b (X X^T) X + c (X X^T)^2 X        so that        s <- a s + b s^3 + c s^5

for every matrix of a batch, on its flat side: X X^T is as small as the shorter dimension.
"""

import math
from collections.abc import Sequence

import torch

Coefficients = tuple[float, float, float]

NEWTON_SCHULZ5: Coefficients = (3.4445, -4.7750, 2.0315)

# Optimal for singular values from 1e-3 to 1 in five steps, each already divided by a safety factor of 1.02.
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Converges at one, where repeating POLAR_EXPRESS's last row would leave values up to 1.083.
POLAR_EXPRESS_TAIL: Coefficients = (1.875, -1.25, 0.375)
POLAR_EXPRESS_SAFETY = 1.02


def newton_schulz5(matrices: torch.Tensor, num_iterations: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """Orthogonalise roughly, by one polynomial that favours speed near zero over convergence at one.

    After 5 steps, singular values that were above 0.003 of the Frobenius norm lie in [0.65, 1.25]. Source:
    Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024
    (kellerjordan.github.io/posts/muon); torch.optim.Muon has the same.

    Args:
        matrices: `[..., rows, cols]`, any floating dtype, in which the iteration runs.
        num_iterations: Steps.
        eps: Least Frobenius norm to divide by: a matrix below it gives a smaller result, zero gives zero.

    Returns:
        `[..., rows, cols]` in the dtype of the input.
    """
    return _iterate(matrices, [NEWTON_SCHULZ5] * num_iterations, safety=1.0, eps=eps)


def polar_express(matrices: torch.Tensor, num_iterations: int = 8, eps: float = 1e-7) -> torch.Tensor:
    """Orthogonalise closely, by polynomials that are each the best after those before.

    After 8 steps, singular values that were above 0.003 of the Frobenius norm lie in [0.95, 1.05]. Steps
    beyond the fifth repeat (1.875, -1.25, 0.375), which converges at one. Source: Amsel et al., "The Polar
    Express", arXiv 2505.16932, with the coefficients of its public implementations (safety factor 1.02,
    cushion 2).

    Args:
        matrices: `[..., rows, cols]`, any floating dtype, in which the iteration runs.
        num_iterations: Steps.
        eps: Least Frobenius norm to divide by: a matrix below it gives a smaller result, zero gives zero.

    Returns:
        `[..., rows, cols]` in the dtype of the input.
    """
    num_tail = max(num_iterations - len(POLAR_EXPRESS), 0)
    coefficients = [*POLAR_EXPRESS[:num_iterations], *[POLAR_EXPRESS_TAIL] * num_tail]
    return _iterate(matrices, coefficients, safety=POLAR_EXPRESS_SAFETY, eps=eps)


def _iterate(
    matrices: torch.Tensor, coefficients: Sequence[Coefficients], *, safety: float, eps: float
) -> torch.Tensor:
    rows, cols = matrices.shape[-2:]
    x = matrices.reshape(math.prod(matrices.shape[:-2]), rows, cols)
    if rows > cols:
        x = x.mT
    # The norm of a bf16 matrix is accumulated in fp32; a bf16 sum over millions of squares would stall.
    norm_dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=norm_dtype)
    x = x / (norm * safety).clamp(min=eps).to(x.dtype)
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if rows > cols:
        x = x.mT
    return x.reshape(matrices.shape)
