"""Statistics over seeds: means with standard errors, and their differences."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Standard error s / sqrt(n), with the sample standard deviation s; None for one seed.
        num_seeds: Number n of seeds with a value.
    """

    mean: float
    error: float | None
    num_seeds: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Estimate the mean of a value per seed, with its standard error; None without values."""
    if not values:
        return None
    num = len(values)
    error = statistics.stdev(values) / math.sqrt(num) if num > 1 else None
    return Estimate(mean=statistics.fmean(values), error=error, num_seeds=num)


def difference(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    """Estimate a - b over independent seeds: variances add; no error where one of them has none."""
    if a is None or b is None:
        return None
    known = a.error is not None and b.error is not None
    error = math.hypot(a.error or 0.0, b.error or 0.0) if known else None
    return Estimate(mean=a.mean - b.mean, error=error, num_seeds=min(a.num_seeds, b.num_seeds))
