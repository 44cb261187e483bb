"""Curves of rows: a mean over seeds with its standard error, by tokens, FLOPs or time."""

import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from eval.report.gradient_peaks import running_medians
from eval.report.rows import Row, seed_of
from eval.report.run_records import RunRecord
from eval.report.run_values import gradient_norms
from eval.report.seed_statistics import Estimate, difference, estimate

SMOOTHED_PART = 50
"""A smoothed loss is the running mean over 1/SMOOTHED_PART of the steps of a run."""

Series = dict[int, float]
"""Values by tokens."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Means over seeds along a run.

    Attributes:
        x: Tokens, FLOPs or seconds; a mean over seeds too.
        mean: Means over seeds.
        error: Their standard errors; all 0 for one seed.
        num_seeds: Number of seeds.
        pairing: Of differences, what they are over, as in seed_statistics.Difference.
    """

    x: list[float]
    mean: list[float]
    error: list[float]
    num_seeds: int
    pairing: str = ""


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Compute the mean of the last `window` values at each point, of all earlier ones at the beginning."""
    sums = [0.0, *itertools.accumulate(values)]
    starts = (max(0, end - window) for end in range(1, len(sums)))
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def _window(run: RunRecord) -> int:
    # of the steps of the whole run: with those so far, the curve of an unfinished run would lag less
    return max(1, (run.last_step or len(run.steps)) // SMOOTHED_PART)


def loss_series(run: RunRecord) -> Series:
    """Return the training loss in nats/token by tokens."""
    return {step["tokens"]: step["loss"] for step in run.steps}


def smoothed_loss_series(run: RunRecord) -> Series:
    """Return the smoothed training loss in nats/token by tokens."""
    smooth = running_mean([step["loss"] for step in run.steps], _window(run))
    return {step["tokens"]: loss for step, loss in zip(run.steps, smooth, strict=True)}


def held_out_series(run: RunRecord) -> Series:
    """Return the held-out loss in nats/token by tokens, without the one before training."""
    return {r["tokens"]: r["validation_loss"] for r in run.held_out if r["tokens"]}


def gradient_norm_series(run: RunRecord) -> Series:
    """Return the running median of the gradient norm by tokens; empty where it was not recorded."""
    medians = zip(run.steps, running_medians(gradient_norms(run)), strict=False)
    return {step["tokens"]: median for step, median in medians if median is not None}


def drawn_runs(row: Row) -> list[RunRecord]:
    """Return the runs that a row's curves are means over: the finished ones, or all if none is."""
    return [run for run in row.runs if run.is_finished] or row.runs


def _by_seed(runs: Sequence[RunRecord], series: Callable[[RunRecord], Series]) -> dict[Hashable, Series]:
    """Return seed -> values of runs at the numbers of tokens at which all have a finite value."""
    found = {seed_of(run): series(run) for run in runs}
    finite = [{tokens for tokens, value in each.items() if math.isfinite(value)} for each in found.values()]
    shared = sorted(set.intersection(*finite))
    return {seed: {tokens: each[tokens] for tokens in shared} for seed, each in found.items()}


def _curve(found: Sequence[Estimate | None], x: Sequence[float]) -> Curve:
    known = [each for each in found if each is not None]
    assert len(known) == len(x)
    return Curve(
        x=list(x),
        mean=[each.mean for each in known],
        error=[each.error or 0.0 for each in known],
        num_seeds=max((each.num_seeds for each in known), default=0),
    )


def curve(row: Row, series: Callable[[RunRecord], Series], axis: str = "tokens") -> Curve:
    """Compute the curve of a row.

    Args:
        row: The row.
        series: Returns a run's values by tokens.
        axis: "tokens", "flops" or "seconds".

    Returns:
        The curve; without points where a run did not record the axis.
    """
    by_tokens = [{step["tokens"]: step[axis] for step in run.steps} for run in drawn_runs(row)]
    values = [*_by_seed(drawn_runs(row), series).values()]
    kept = [tokens for tokens in values[0] if all(each.get(tokens) is not None for each in by_tokens)]
    found = [estimate([each[tokens] for each in values]) for tokens in kept]
    return _curve(found, [statistics.fmean(each[tokens] for each in by_tokens) for tokens in kept])


def difference_curve(
    runs: Sequence[RunRecord],
    others: Sequence[RunRecord],
    series: Callable[[RunRecord], Series],
    *,
    smoothed: bool = False,
) -> Curve:
    """Compute the difference of runs to others at every number of tokens at which all of them have a value.

    Args:
        runs: Runs that differ only in their seeds.
        others: The runs to subtract, likewise.
        series: Returns a run's values by tokens.
        smoothed: Whether to smooth the runs, over the same tokens in all of them.
    """
    ours, base = (_by_seed(each, series) for each in (runs, others))
    shared = sorted(set.intersection(*map(set, (*ours.values(), *base.values()))))
    window = _window(runs[0]) if smoothed else 1

    def smooth(runs: Mapping[Hashable, Series]) -> dict[Hashable, list[float]]:
        return {
            seed: running_mean([each[tokens] for tokens in shared], window) for seed, each in runs.items()
        }

    one, two = smooth(ours), smooth(base)
    found = [
        difference(
            {seed: each[i] for seed, each in one.items()}, {seed: each[i] for seed, each in two.items()}
        )
        for i in range(len(shared))
    ]
    pairing = next((each.pairing for each in found if each is not None), "")
    return replace(_curve(found, shared), pairing=pairing)
