"""Peaks of the gradient norm: steps far above the running median. Spikes are what training records."""

import bisect
import math
from collections.abc import Sequence

WINDOW = 100
"""Steps whose median a step is compared with, those before it."""
MIN_STEPS = 20
"""The first steps, which have fewer steps before them, are not judged."""
FACTOR = 3.0
"""A peak is more than FACTOR times the median."""


def running_medians(values: Sequence[float], window: int = WINDOW) -> list[float | None]:
    """Compute the median of the `window` values before each one, of those that are not NaN.

    Returns:
        The medians; None for the first MIN_STEPS, and where all values before are NaN.
    """
    ordered: list[float] = []
    medians: list[float | None] = []
    for index, value in enumerate(values):
        middle = len(ordered) // 2
        odd = len(ordered) % 2 == 1
        median = None
        if index >= MIN_STEPS and ordered:
            median = ordered[middle] if odd else (ordered[middle - 1] + ordered[middle]) / 2
        medians.append(median)
        # NaN is not ordered
        if not math.isnan(value):
            bisect.insort(ordered, value)
        if index >= window and not math.isnan(values[index - window]):
            del ordered[bisect.bisect_left(ordered, values[index - window])]
    return medians


def find_peaks(values: Sequence[float]) -> list[int]:
    """Find the peaks: values above FACTOR times the median of the WINDOW values before them.

    Args:
        values: Gradient norms of consecutive steps, before clipping.

    Returns:
        The index of the largest value of each peak; adjacent steps are one peak.
    """
    peaks: list[list[int]] = []
    for index, (value, median) in enumerate(zip(values, running_medians(values), strict=True)):
        if median is None or not value > FACTOR * median:
            continue
        if peaks and peaks[-1][-1] == index - 1:
            peaks[-1].append(index)
        else:
            peaks.append([index])
    return [max(peak, key=lambda index: values[index]) for peak in peaks]
