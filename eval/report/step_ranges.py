"""Ranges of training steps without a record, and how they are said."""

from collections.abc import Collection, Sequence

Ranges = list[tuple[int, int]]
"""Ranges (from, to) of steps, both included."""

_MAX_SHOWN = 3


def missing_ranges(recorded: Collection[int], first: int, last: int) -> Ranges:
    """Return the ranges of steps from first to last that are not among the recorded ones.

    Args:
        recorded: Steps in any order.
        first: The first step to look for.
        last: The last one.
    """
    missing: Ranges = []
    before = first - 1
    for step in [*sorted({each for each in recorded if first <= each <= last}), last + 1]:
        if step > before + 1:
            missing.append((before + 1, step - 1))
        before = step
    return missing


def format_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """Format ranges of steps: "step 3", "steps 1 to 9 and 12 to 14"; of more than three the first."""
    parts = [str(first) if first == last else f"{first} to {last}" for first, last in ranges]
    plural = "s" if len(parts) > 1 or "to" in parts[0] else ""
    more = ", and others" if len(parts) > _MAX_SHOWN else ""
    return f"step{plural} " + " and ".join(parts[:_MAX_SHOWN]) + more
