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
) -> list[tuple[dict[str, Values], dict[str, dict[str, Values]]]]:
    """Reduce rows to heads, and to context lengths, of several layers at once.

    Args:
        statistics: Name of a quantity -> `[L, B, N, H]` of L layers; NaN where a row has no value.
        sample: The sampled rows.
        visible: Which keys they see.

    Returns:
        Of each layer "<quantity>/<reduction>" -> value of each head, and quantity -> "mean" and "stderr" ->
        value of each of context_bounds, of the means over heads. Quantities of the first token are those of
        rows that see the first token of their document, "middle_mean" and "middle_stderr" those of the
        others.
    """
    heads: dict[str, list[Values]] = {}
    by_context: dict[str, dict[str, list[Values]]] = {}
    sees_start_R = visible.is_document_start_BN[sample.is_sampled_BN]
    context_R = sample.context_lengths
    bounds = context_bounds(sample.tokens_BT.shape[1])
    for name, values_LBNH in statistics.items():
        quantity = QUANTITIES[name]
        values_LRH = values_LBNH[:, sample.is_sampled_BN].double()
        kept_R = sees_start_R if quantity.needs_start else torch.ones_like(sees_start_R)
        groups = {"": kept_R} | ({"middle_": ~kept_R} if quantity.needs_start else {})
        for prefix, is_in_R in groups.items():
            rows_LRH = values_LRH if is_in_R.all() else values_LRH[:, is_in_R]
            for reduction in quantity.reductions:
                heads[f"{name}/{prefix}{reduction}"] = _values(_reduce(rows_LRH, reduction))
                if reduction == "mean":
                    heads[f"{name}/{prefix}stderr"] = _values(_standard_error(rows_LRH, sample))
        if quantity.by_context:
            means_LR = values_LRH.mean(2)
            rows = [means_LR[:, kept_R & (context_R >= low) & (context_R <= high)] for low, high in bounds]
            by_context[name] = {
                "mean": _values(torch.stack([_reduce(each, "mean") for each in rows], 1)),
                "stderr": _values(torch.stack([_standard_error(each, sample) for each in rows], 1)),
            }
    num_layers = len(next(iter(statistics.values())))
    return [
        (
            {name: values[layer] for name, values in heads.items()},
            {
                name: {key: values[layer] for key, values in found.items()}
                for name, found in by_context.items()
            },
        )
        for layer in range(num_layers)
    ]


def context_counts(sample: QuerySample) -> dict[str, Any]:
    """Return the bounds of the context lengths, and the number of sampled rows in each."""
    bounds = context_bounds(sample.tokens_BT.shape[1])
    context_R = sample.context_lengths
    counts = [int(((context_R >= low) & (context_R <= high)).sum()) for low, high in bounds]
    return {"bounds": [list(each) for each in bounds], "num_queries": counts}


def rounded(value: float) -> float | None:
    """Round to six significant digits; None for NaN and Inf, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _values(x_LH: Tensor) -> list[Values]:
    return [[rounded(each) for each in values] for values in x_LH.tolist()]


def _reduce(values_LRH: Tensor, reduction: Reduction) -> Tensor:
    """Reduce the rows, without those that are NaN; NaN without rows."""
    if not values_LRH.shape[1]:
        return values_LRH.sum(1) + torch.nan
    match reduction:
        case "mean":
            return values_LRH.nanmean(1)
        case "median":
            return values_LRH.nanquantile(0.5, dim=1)
        case "p95":
            return values_LRH.nanquantile(0.95, dim=1)
        case "max":
            return values_LRH.amax(1)
        case "min":
            return values_LRH.amin(1)


def _standard_error(values_LRH: Tensor, sample: QuerySample) -> Tensor:
    """Compute the standard error of the mean over rows; NaN for fewer than two rows."""
    num_LH = values_LRH.isfinite().sum(1)
    squares_LH = (values_LRH - values_LRH.nanmean(1, keepdim=True)).square().nansum(1)
    unsampled = 1 - sample.num_queries / sample.num_candidates
    return (squares_LH / (num_LH - 1) / num_LH * unsampled).sqrt()
