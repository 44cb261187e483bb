"""The report's plots: loss curves of rows as PNG files."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.report.comparison import Estimate, Row, difference, estimate
from eval.report.run_records import RunRecord
from eval.report.task_records import Record

AXES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "hours of training steps"}
SMOOTHED_PART = 100
"""A smoothed loss is the running mean over 1/SMOOTHED_PART of the steps of a run."""
_SKIPPED_PART = 20  # the limits of the y axis leave out the first twentieth of a run

Series = dict[int, float]
"""Values by tokens."""


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Compute the mean of the last `window` values at each point, of all earlier ones at the beginning."""
    sums = [0.0, *itertools.accumulate(values)]
    starts = (max(0, end - window) for end in range(1, len(sums)))
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def smoothed_loss(run: RunRecord) -> list[float]:
    """Compute the smoothed training loss of every step in nats/token."""
    # of the steps of the whole run: with those so far, the curve of an unfinished run would lag less
    num_steps = run.last_step or len(run.steps)
    return running_mean([step["loss"] for step in run.steps], max(1, num_steps // SMOOTHED_PART))


def loss_series(run: RunRecord) -> Series:
    """Return the training loss in nats/token by tokens."""
    return {step["tokens"]: step["loss"] for step in run.steps}


def held_out_series(run: RunRecord) -> Series:
    """Return the held-out loss in nats/token by tokens."""
    return {r["tokens"]: r["validation_loss"] for r in run.held_out if r["tokens"] is not None}


def difference_series(row: Row, baseline: Row, series: Callable[[RunRecord], Series]) -> dict[int, Estimate]:
    """Estimate row - baseline at every number of tokens at which all runs of both have a value.

    Args:
        row: The row.
        baseline: The row to subtract.
        series: Returns a run's values by tokens.

    Returns:
        The differences by tokens, ascending.
    """
    ours, base = ([series(run) for run in r.runs] for r in (row, baseline))
    shared = set.intersection(*(set(values) for values in (*ours, *base)))
    found = {}
    for tokens in sorted(shared):
        delta = difference(estimate([v[tokens] for v in ours]), estimate([v[tokens] for v in base]))
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


def _x_values(records: Sequence[Record], axis: str) -> list[float]:
    scale = 1 / 3600 if axis == "seconds" else 1.0
    return [record[axis] * scale for record in records]


def plot_loss(rows: Sequence[Row], axis: str, path: Path) -> bool:
    """Plot the smoothed training loss of every run; seeds of a row share a color.

    Args:
        rows: The rows.
        axis: A key of AXES.
        path: The PNG to write.

    Returns:
        Whether any run has that axis; without one no file is written.
    """
    figure, axes = _axes(AXES[axis], "loss, nats/token", f"training loss against {AXES[axis]}")
    drawn: list[float] = []
    for index, row in enumerate(rows):
        label = row.name
        for run in row.runs:
            if run.steps[-1][axis] is None:
                continue
            loss = smoothed_loss(run)
            axes.plot(_x_values(run.steps, axis), loss, color=f"C{index}", linewidth=1, label=label)
            drawn += loss[len(loss) // _SKIPPED_PART :]
            label = None
    if drawn:
        margin = 0.03 * (max(drawn) - min(drawn)) or 0.1
        axes.set_ylim(min(drawn) - margin, max(drawn) + margin)
        _write(figure, axes, path)
    return bool(drawn)


def plot_held_out(rows: Sequence[Row], path: Path) -> bool:
    """Plot the held-out loss of every run against tokens, without the one before training.

    Args:
        rows: The rows.
        path: The PNG to write.

    Returns:
        Whether any run has a held-out loss after a training step; without one no file is written.
    """
    figure, axes = _axes("tokens", "loss, nats/token", "held-out loss")
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
    """Plot the loss of each row minus the baseline's: lines for training, error bars for held-out.

    Args:
        rows: The rows.
        baseline: One of them.
        path: The PNG to write.

    Returns:
        Whether any row has a loss at the same number of tokens as the baseline; without one no file is
        written.
    """
    figure, axes = _axes("tokens", "difference in loss, nats/token", f"loss minus {baseline.name}")
    axes.axhline(0.0, color="black", linewidth=0.8)
    drawn: list[float] = []
    for index, row in enumerate(rows):
        if row is baseline:
            continue
        lines = difference_series(row, baseline, loss_series)
        points = {t: e for t, e in difference_series(row, baseline, held_out_series).items() if t > 0}
        # subtracted before smoothing, so that both losses are averaged over the same steps
        window = max(1, (row.runs[0].last_step or len(lines)) // SMOOTHED_PART)
        means = running_mean([delta.mean for delta in lines.values()], window)
        color = f"C{index}"
        axes.plot(list(lines), means, color=color, linewidth=0.8, alpha=0.6, label=f"{row.name}, training")
        axes.errorbar(
            list(points),
            [delta.mean for delta in points.values()],
            yerr=[delta.error or 0.0 for delta in points.values()],
            fmt="o",
            color=color,
            markersize=4,
            capsize=3,
            label=f"{row.name}, held-out",
        )
        drawn += means[len(means) // _SKIPPED_PART :] + [delta.mean for delta in points.values()]
    if drawn:
        low, high = min(0.0, *drawn), max(0.0, *drawn)
        margin = 0.1 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
        _write(figure, axes, path)
    return bool(drawn)
