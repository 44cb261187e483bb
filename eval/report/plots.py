"""The report's loss curves: training loss, held-out loss, differences to the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes

from eval.figure import add_legend, format_counts, new_axes, save
from eval.report.curves import (
    Curve,
    curve,
    difference_curve,
    drawn_runs,
    held_out_series,
    loss_series,
    smoothed_loss_series,
)
from eval.report.drawing import (
    draw_curve,
    draw_points,
    label_grey,
    label_other_rates,
    late_values,
    limit_y,
    places,
    spread,
)
from eval.report.rows import Row
from eval.report.run_records import RunRecord
from eval.report.styles import Style

AXES = {"tokens": "training tokens", "flops": "training compute", "seconds": "training time"}
_TIMES = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def _scale_x(axes: Axes, axis: str, curves: Sequence[Curve]) -> float:
    """Label the x axis and format its ticks; return the size of its unit."""
    largest = max((max(each.x, default=0.0) for each in curves), default=0.0)
    if axis == "tokens":
        axes.set_xlabel("Training tokens")
        format_counts(axes)
        return 1.0
    if axis == "seconds":
        unit, size = next((each for each in _TIMES if largest >= 2 * each[1]), _TIMES[-1])
        axes.set_xlabel(f"Training time ({unit})")
        return size
    power = len(f"{largest:.0f}") - 1
    axes.set_xlabel(f"Training compute ($10^{{{power}}}$ FLOPs)")
    return 10.0**power


def plot_loss(rows: Sequence[Row], styles: Mapping[str, Style], axis: str, path: Path) -> bool:
    """Plot the smoothed training loss of every row.

    Args:
        rows: The rows.
        styles: Name of a row -> its style.
        axis: A key of AXES.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any row has that axis; without one no file is written.
    """
    curves = [curve(row, smoothed_loss_series, axis) for row in rows]
    if not any(each.x for each in curves):
        return False
    title = f"Training loss against {AXES[axis]}"
    figure, axes = new_axes(title=title, x="", y="Training loss (nats/token)")
    size = _scale_x(axes, axis, curves)
    late: list[float] = []
    for row, each in zip(rows, curves, strict=True):
        scaled = replace(each, x=[x / size for x in each.x])
        draw_curve(axes, scaled, styles[row.name], label=row.name)
        if styles[row.name].is_main:
            late += late_values(scaled)
    axes.set_xlim(left=0)
    limit_y(axes, late)
    label_other_rates(axes, styles.values())
    add_legend(axes)
    save(figure, path)
    return True


def plot_held_out(rows: Sequence[Row], styles: Mapping[str, Style], path: Path) -> bool:
    """Plot the held-out loss of every row against tokens, without the one before training.

    Args:
        rows: The rows.
        styles: Name of a row -> its style.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any row has held-out losses after at least two training steps, as one alone is no curve;
        without one no file is written.
    """
    curves = [curve(row, held_out_series) for row in rows]
    if max((len(each.x) for each in curves), default=0) < 2:
        return False
    figure, axes = new_axes(title="Held-out loss", x="Training tokens", y="Held-out loss (nats/token)")
    format_counts(axes)
    late: list[float] = []
    for row, each in zip(rows, curves, strict=True):
        style = styles[row.name]
        draw_curve(axes, each, style, label=row.name, marked=True)
        late += late_values(each) if style.is_main else []
    axes.set_xlim(left=0)
    limit_y(axes, late)
    label_other_rates(axes, styles.values())
    add_legend(axes)
    save(figure, path)
    return True


def plot_differences(
    rows: Sequence[Row], styles: Mapping[str, Style], baseline: Row | None, path: Path
) -> bool:
    """Plot the loss of each main row minus the baseline's: lines for training, points for held-out.

    Args:
        rows: The rows.
        styles: Name of a row -> its style.
        baseline: One of them; None for no plot.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any row has a loss at the same number of tokens as the baseline; without one no file is
        written.
    """
    if baseline is None:
        return False
    others = [row for row in rows if row is not baseline and styles[row.name].is_main]
    title = f"Loss minus that of {baseline.name}"
    base = drawn_runs(baseline)
    return plot_loss_differences([(row.name, drawn_runs(row), base) for row in others], styles, title, path)


def plot_loss_differences(
    compared: Sequence[tuple[str, Sequence[RunRecord], Sequence[RunRecord]]],
    styles: Mapping[str, Style],
    title: str,
    path: Path,
) -> bool:
    """Plot the loss of rows minus that of others: lines for training, points for held-out.

    Args:
        compared: Name of each row, its runs, and the runs to subtract.
        styles: Name of a row -> its style.
        title: Title of the figure.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any row has a loss at the same number of tokens as what is subtracted; without one no file is
        written.
    """
    lines = [difference_curve(runs, others, loss_series, smoothed=True) for _, runs, others in compared]
    points = [difference_curve(runs, others, held_out_series) for _, runs, others in compared]
    if not any(each.x for each in (*lines, *points)):
        return False
    figure, axes = new_axes(title=title, x="Training tokens", y="Difference in loss (nats/token)")
    format_counts(axes)
    axes.axhline(0.0, color="#333333", linewidth=0.8)
    late: list[float] = []
    for (name, _, _), line, held_out, place in zip(
        compared, lines, points, places(len(compared)), strict=True
    ):
        style, pairing = styles[name], line.pairing or held_out.pairing
        draw_curve(axes, line, style, label=f"{name} ({pairing})" if pairing else name)
        draw_points(axes, spread(held_out, place), style, label=None, line=False)
        late += late_values(line) + late_values(held_out)
    axes.set_xlim(left=0)
    limit_y(axes, [0.0, *late])
    label_grey(axes, "Training")
    if any(each.x for each in points):
        label_grey(axes, "Held-out", linestyle="none", marker="o", markersize=5)
    add_legend(axes)
    save(figure, path)
    return True
