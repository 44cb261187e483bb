"""The report's pictures: curves of rows as PNG files."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.report.comparison import Estimate, Row, difference, estimate
from eval.report.run_records import Record, RunRecord

AXES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "hours of training steps"}
SMOOTHED_PART = 100
"""A smoothed curve's point is the mean of the steps before it, over a hundredth of the whole run."""
_SKIPPED_PART = 20  # the first twentieth of a run would set the scale of the losses

Series = dict[int, float]
"""Values by tokens."""


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each point, of all so far at the beginning."""
    sums = [0.0, *itertools.accumulate(values)]
    starts = (max(0, end - window) for end in range(1, len(sums)))
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def smoothed_loss(run: RunRecord) -> list[float]:
    """The training loss of every step in nats/token, smoothed."""
    # not of the steps so far: the curve of an unfinished run would lag less
    num_steps = run.last_step or len(run.steps)
    return running_mean([step["loss"] for step in run.steps], max(1, num_steps // SMOOTHED_PART))


def loss_series(run: RunRecord) -> Series:
    """The training loss by tokens."""
    return {step["tokens"]: step["loss"] for step in run.steps}


def held_out_series(run: RunRecord) -> Series:
    """The held-out loss by tokens."""
    return {r["tokens"]: r["validation_loss"] for r in run.held_out if r["tokens"] is not None}


def difference_series(row: Row, baseline: Row, series: Callable[[RunRecord], Series]) -> dict[int, Estimate]:
    """Where all runs of both rows have a value at the same number of tokens, the difference of the rows.

    Args:
        row: The row.
        baseline: What is subtracted.
        series: A run's values.

    Returns:
        By tokens, in order.
    """
    ours, theirs = ([series(run) for run in r.runs] for r in (row, baseline))
    shared = set.intersection(*(set(values) for values in (*ours, *theirs)))
    found = {}
    for tokens in sorted(shared):
        delta = difference(estimate([v[tokens] for v in ours]), estimate([v[tokens] for v in theirs]))
        assert delta is not None
        found[tokens] = delta
    return found


def _axes(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _write(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _positions(records: Sequence[Record], axis: str) -> list[float]:
    scale = 1 / 3600 if axis == "seconds" else 1.0
    return [record[axis] * scale for record in records]


def plot_loss(rows: Sequence[Row], axis: str, path: Path) -> bool:
    """Draw every run's smoothed training loss; seeds of a row share its colour.

    Args:
        rows: The rows.
        axis: A key of AXES.
        path: The PNG to write.

    Returns:
        Whether there was anything to draw: runs without that axis are left out.
    """
    figure, axes = _axes(AXES[axis], "nats/token", f"training loss against {AXES[axis]}")
    seen: list[float] = []
    for index, row in enumerate(rows):
        label = row.name
        for run in row.runs:
            if run.steps[-1][axis] is None:
                continue
            loss = smoothed_loss(run)
            axes.plot(_positions(run.steps, axis), loss, color=f"C{index}", linewidth=1, label=label)
            seen += loss[len(loss) // _SKIPPED_PART :]
            label = None
    if seen:
        margin = 0.03 * (max(seen) - min(seen)) or 0.1
        axes.set_ylim(min(seen) - margin, max(seen) + margin)
        _write(figure, axes, path)
    return bool(seen)


def plot_held_out(rows: Sequence[Row], path: Path) -> bool:
    """Draw every run's held-out loss against tokens, from the first training step on.

    Args:
        rows: The rows.
        path: The PNG to write.

    Returns:
        Whether any run has one after a training step.
    """
    figure, axes = _axes("tokens", "nats/token", "held-out loss")
    has_points = False
    for index, row in enumerate(rows):
        label = row.name
        for run in row.runs:
            points = {tokens: loss for tokens, loss in held_out_series(run).items() if tokens > 0}
            if points:
                x, y = list(points), list(points.values())
                axes.plot(x, y, "o-", color=f"C{index}", markersize=4, label=label)
                has_points, label = True, None
    if has_points:
        _write(figure, axes, path)
    return has_points


def plot_differences(rows: Sequence[Row], baseline: Row, path: Path) -> bool:
    """Draw each other row's loss less the baseline's: lines for training, points with errors for held-out.

    Args:
        rows: The rows.
        baseline: One of them.
        path: The PNG to write.

    Returns:
        Whether any row shares numbers of tokens with the baseline.
    """
    figure, axes = _axes("tokens", "nats/token", f"loss less that of {baseline.name}")
    axes.axhline(0.0, color="black", linewidth=0.8)
    seen: list[float] = []
    for index, row in enumerate(rows):
        if row is baseline:
            continue
        lines = difference_series(row, baseline, loss_series)
        points = {t: e for t, e in difference_series(row, baseline, held_out_series).items() if t > 0}
        # smoothed last: means of the losses over other windows would differ by themselves
        window = max(1, (row.runs[0].last_step or len(lines)) // SMOOTHED_PART)
        means = running_mean([delta.mean for delta in lines.values()], window)
        colour = f"C{index}"
        axes.plot(list(lines), means, color=colour, linewidth=0.8, alpha=0.6, label=f"{row.name}, training")
        axes.errorbar(
            list(points),
            [delta.mean for delta in points.values()],
            yerr=[delta.error or 0.0 for delta in points.values()],
            fmt="o",
            color=colour,
            markersize=4,
            capsize=3,
            label=f"{row.name}, held-out",
        )
        seen += means[len(means) // _SKIPPED_PART :] + [delta.mean for delta in points.values()]
    if seen:
        low, high = min(0.0, *seen), max(0.0, *seen)
        margin = 0.1 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
        _write(figure, axes, path)
    return bool(seen)
