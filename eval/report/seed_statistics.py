"""Statistics over seeds: means with standard errors, and their differences."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_Seed = TypeVar("_Seed", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean; NaN or Inf if a value is.
        error: Standard error s / sqrt(n), with the sample standard deviation s; None for one seed, and where
            the mean is not finite.
        num_seeds: Number n of seeds with a value.
    """

    mean: float
    error: float | None
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """A difference of two groups of runs.

    Attributes:
        pairing: What it is over, to stand beside it: "3 pairs" of runs of equal seeds, or "unpaired, 2 and 3
            seeds".
    """

    pairing: str


def estimate(values: Sequence[float]) -> Estimate | None:
    """Estimate the mean of a value per seed, with its standard error; None without values."""
    if not values:
        return None
    num = len(values)
    if not all(map(math.isfinite, values)):
        return Estimate(mean=sum(values) / num, error=None, num_seeds=num)
    error = statistics.stdev(values) / math.sqrt(num) if num > 1 else None
    return Estimate(mean=statistics.fmean(values), error=error, num_seeds=num)


def difference(ours: Mapping[_Seed, float], base: Mapping[_Seed, float]) -> Difference | None:
    """Estimate the mean difference of two groups of runs.

    Runs of the same seed read the same data in the same order, so that much of the noise of a pair is common
    and drops out of its difference.

    Args:
        ours: Seed -> value.
        base: Seed -> the value to subtract.

    Returns:
        Where they share two seeds or more, the mean of the differences at these, with its standard error
        s / sqrt(n). Else the difference of the means, with sqrt(s1^2/n1 + s2^2/n2). Where one of them has a
        single seed, which has no error, the difference at that seed if they share it. None if either has no
        value.
    """
    one, two = estimate([*ours.values()]), estimate([*base.values()])
    if one is None or two is None:
        return None
    shared = [seed for seed in ours if seed in base]
    paired = estimate([ours[seed] - base[seed] for seed in shared])
    if paired is not None and (len(shared) > 1 or 1 in (len(ours), len(base))):
        pairing = f"{len(shared)} {'pair' if len(shared) == 1 else 'pairs'}"
        return Difference(**vars(paired), pairing=pairing)
    return Difference(
        mean=one.mean - two.mean,
        error=None if one.error is None or two.error is None else math.hypot(one.error, two.error),
        num_seeds=min(one.num_seeds, two.num_seeds),
        pairing=f"unpaired, {one.num_seeds} and {two.num_seeds} seeds",
    )
