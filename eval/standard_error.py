"""The standard error over documents of a loss per token: that of a ratio of two sums."""

import math

import torch


def ratio_standard_error(nats: torch.Tensor, tokens: torch.Tensor) -> float | None:
    """Estimate the standard error of sum(nats) / sum(tokens) over documents drawn at random.

    With loss sums y_i and token counts x_i of n documents, and R = sum y / sum x:

        s.e.(R) = sqrt(n / (n - 1) * sum_i (y_i - R x_i)^2) / sum_i x_i

    This is the linearized variance of the ratio estimator (Cochran, Sampling Techniques, 3rd edition 1977,
    section 6.4) without the correction for a finite population: also for all documents of a set, it tells how
    much another set of its kind would differ. Tokens of one document are not independent; documents are taken
    to be.

    Args:
        nats: Loss sums of the documents, fp64 `[N]`.
        tokens: Their numbers of predicted tokens, `[N]`; documents without any are left out.

    Returns:
        The standard error in nats/token; None for fewer than two documents.
    """
    nats, tokens = nats[tokens > 0], tokens[tokens > 0].double()
    if len(tokens) < 2:
        return None
    residuals = nats - nats.sum() / tokens.sum() * tokens
    variance = len(tokens) / (len(tokens) - 1) * residuals.square().sum() / tokens.sum().square()
    return math.sqrt(float(variance))
