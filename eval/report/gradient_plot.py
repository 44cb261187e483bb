"""The plot of gradient norms: running medians, and the peaks above them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.figure import add_legend, format_counts, format_log_axis, new_axes, save
from eval.report.curves import curve, drawn_runs, gradient_norm_series
from eval.report.drawing import draw_curve, label_grey
from eval.report.gradient_peaks import find_peaks
from eval.report.rows import Row
from eval.report.run_records import RunRecord
from eval.report.run_values import gradient_norms
from eval.report.styles import Style


def plot_gradient_norms(rows: Sequence[Row], styles: Mapping[str, Style], path: Path) -> bool:
    """Plot the running median of the gradient norm of the main rows, and the peaks of their runs.

    Args:
        rows: The rows.
        styles: Name of a row -> its style.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any run has recorded gradient norms; without one no file is written.
    """
    main = [row for row in rows if styles[row.name].is_main]
    curves = [curve(row, gradient_norm_series) for row in main]
    if not any(each.x for each in curves):
        return False
    figure, axes = new_axes(title="Gradient norm before clipping", x="Training tokens", y="Gradient norm")
    shown: list[float] = []
    for row, each in zip(main, curves, strict=True):
        style = styles[row.name]
        peaks = [peak for run in drawn_runs(row) for peak in _peaks(run)]
        num = len(peaks)
        draw_curve(axes, each, style, label=f"{row.name} ({num} {'peak' if num == 1 else 'peaks'})")
        look: dict[str, Any] = {
            "linestyle": "none",
            "marker": "^",
            "markersize": 5,
            "zorder": 4,
            **style.colors,
        }
        axes.plot([tokens for tokens, _ in peaks], [norm for _, norm in peaks], **look)
        shown += [*each.mean, *(norm for _, norm in peaks)]
    format_counts(axes)
    format_log_axis(axes, "y", shown)
    axes.set_xlim(left=0)
    label_grey(axes, "Running median")
    if any(_peaks(run) for row in main for run in drawn_runs(row)):
        label_grey(axes, "Peak", linestyle="none", marker="^", markersize=5)
    add_legend(axes)
    save(figure, path)
    return True


def _peaks(run: RunRecord) -> list[tuple[int, float]]:
    """Return the tokens and the gradient norm of each peak."""
    norms = gradient_norms(run)
    return [(run.steps[index]["tokens"], norms[index]) for index in find_peaks(norms)]
