"""Reduce quantities of sampled rows to heads and to context lengths, with their sampling error.

The standard error of a mean is that of a simple random sample of R of the batch's M candidates, drawn
without replacement: s / sqrt(R) sqrt(1 - R / M), s^2 being the rows' unbiased variance (Cochran, *Sampling
Techniques*, 1977, section 2.6). It is the error against all rows of the batch, and does not include that of
the batch.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eval.diagnostics.quantities import QUANTITIES, Reduction
from eval.diagnostics.sample import QuerySample, VisibleKeys

Values = list[float | None]
"""Values of heads or of context lengths; None where there is no row, or the value is NaN or Inf."""


def context_bounds(seq_len: int) -> list[tuple[int, int]]:
    """Return the context lengths (from, to) that are counted together: 1 to 16, then by powers of 4."""
    bounds = [(1, 16)]
    while bounds[-1][1] < seq_len:
        bounds.append((bounds[-1][1] + 1, 4 * bounds[-1][1]))
    return [(low, min(high, seq_len)) for low, high in bounds]


def summarize(
    statistics: Mapping[str, Tensor], sample: QuerySample, visible: VisibleKeys
) -> tuple[dict[str, Values], dict[str, dict[str, Values]]]:
    """Reduce rows to heads, and to context lengths.

    Args:
        statistics: Name of a quantity -> `[B, N, H]`; NaN where a row has no value.
        sample: The sampled rows.
        visible: Which keys they see.

    Returns:
        "<quantity>/<reduction>" -> value of each head, and quantity -> "mean" and "stderr" -> value of each
        of context_bounds, of the means over heads. Quantities of the first token are those of rows that see
        the first token of their document, "middle_mean" and "middle_stderr" those of the others.
    """
    heads: dict[str, Values] = {}
    by_context: dict[str, dict[str, Values]] = {}
    sees_start_R = visible.is_document_start_BN[sample.is_sampled_BN]
    context_R = sample.context_lengths
    for name, values_BNH in statistics.items():
        quantity = QUANTITIES[name]
        values_RH = values_BNH[sample.is_sampled_BN].double()
        kept_R = sees_start_R if quantity.needs_start else torch.ones_like(sees_start_R)
        groups = {"": kept_R} | ({"middle_": ~kept_R} if quantity.needs_start else {})
        for prefix, is_in_R in groups.items():
            for reduction in quantity.reductions:
                found = _reduce(values_RH[is_in_R], reduction)
                heads[f"{name}/{prefix}{reduction}"] = _values(found)
                if reduction == "mean":
                    errors = _standard_error(values_RH[is_in_R], sample)
                    heads[f"{name}/{prefix}stderr"] = _values(errors)
        if quantity.by_context:
            means_R1 = values_RH.mean(1, keepdim=True)
            rows = [
                means_R1[kept_R & (context_R >= low) & (context_R <= high)]
                for low, high in context_bounds(sample.tokens_BT.shape[1])
            ]
            by_context[name] = {
                "mean": [_values(_reduce(each, "mean"))[0] for each in rows],
                "stderr": [_values(_standard_error(each, sample))[0] for each in rows],
            }
    return heads, by_context


def context_counts(sample: QuerySample) -> dict[str, Any]:
    """Return the bounds of the context lengths, and the number of sampled rows in each."""
    bounds = context_bounds(sample.tokens_BT.shape[1])
    context_R = sample.context_lengths
    counts = [int(((context_R >= low) & (context_R <= high)).sum()) for low, high in bounds]
    return {"bounds": [list(each) for each in bounds], "num_queries": counts}


def rounded(value: float) -> float | None:
    """Round to six significant digits; None for NaN and Inf, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _values(x: Tensor) -> Values:
    return [rounded(each) for each in x.tolist()]


def _reduce(values_RH: Tensor, reduction: Reduction) -> Tensor:
    """Reduce the rows of each head, without those that are NaN; NaN without rows."""
    if not len(values_RH):
        return values_RH.new_full(values_RH.shape[1:], torch.nan)
    match reduction:
        case "mean":
            return values_RH.nanmean(0)
        case "median":
            return values_RH.nanquantile(0.5, dim=0)
        case "p95":
            return values_RH.nanquantile(0.95, dim=0)
        case "max":
            return values_RH.amax(0)
        case "min":
            return values_RH.amin(0)


def _standard_error(values_RH: Tensor, sample: QuerySample) -> Tensor:
    """Compute the standard error of the mean over rows; NaN for fewer than two rows."""
    num_H = values_RH.isfinite().sum(0)
    squares_H = (values_RH - values_RH.nanmean(0)).square().nansum(0)
    unsampled = 1 - sample.num_queries / sample.num_candidates
    return (squares_H / (num_H - 1) / num_H * unsampled).sqrt()
