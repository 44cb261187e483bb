"""Drawing of curves with bands over seeds, of points with error bars, and the limits of the loss axis."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes

from eval.figure import padded
from eval.report.curves import Curve
from eval.report.styles import MARKERS, Style

SKIPPED_PART = 0.2
"""The limits of the loss axis leave out the first fifth of a run, in which the loss falls fastest."""
NUM_PARTS = 20
"""Parts of a run whose medians the limits of the loss axis hold, so that no spike sets them."""
_DODGE = 0.15  # part of the distance of points over which those of all rows are spread
_GREY = "#777777"


def draw_curve(axes: Axes, curve: Curve, style: Style, *, label: str | None, marked: bool = False) -> None:
    """Draw a line, and a band of one standard error over seeds.

    Args:
        axes: The axes.
        curve: The curve.
        style: The look of its row.
        label: For the legend, which has main rows only.
        marked: Whether each value is a point on the line.
    """
    # a few points along the line, where its color alone does not tell the row
    is_marked = style.is_main and (marked or style.marker != MARKERS[0])
    axes.plot(
        curve.x,
        curve.mean,
        label=label if style.is_main else None,
        zorder=3 if style.is_main else 2,
        alpha=style.alpha,
        linewidth=style.width,
        linestyle=style.dash,
        marker=style.marker if is_marked else None,
        markevery=None if marked else 0.15,
        **style.colors,
    )
    if style.is_main and curve.num_seeds > 1:
        low = [mean - error for mean, error in zip(curve.mean, curve.error, strict=True)]
        high = [mean + error for mean, error in zip(curve.mean, curve.error, strict=True)]
        axes.fill_between(curve.x, low, high, color=style.color, alpha=0.2, linewidth=0)


def draw_points(axes: Axes, curve: Curve, style: Style, *, label: str | None, line: bool = True) -> None:
    """Draw points with error bars over seeds.

    Args:
        axes: The axes.
        curve: The points.
        style: The look of their row.
        label: For the legend.
        line: Whether a line joins the points.
    """
    axes.errorbar(
        curve.x,
        curve.mean,
        yerr=curve.error if curve.num_seeds > 1 else None,
        fmt=style.marker,
        linestyle=style.dash if line else "none",
        linewidth=style.width,
        elinewidth=1.0,
        capsize=2.5,
        label=label,
        zorder=4,
        **style.colors,
    )


def label_grey(axes: Axes, label: str, **look: Any) -> None:
    """Add what a look means in all colors to the legend, in grey."""
    axes.plot([], [], color=_GREY, label=label, **look)


def label_other_rates(axes: Axes, styles: Iterable[Style]) -> None:
    """Add the faint lines to the legend, if there are any."""
    if not all(style.is_main for style in styles):
        label_grey(axes, "Other learning rates", linewidth=0.8, alpha=0.6)


def spread(curve: Curve, place: float) -> Curve:
    """Move points aside by their row's place, so that error bars of rows at the same tokens stand apart."""
    step = min((b - a for a, b in zip(curve.x, curve.x[1:], strict=False)), default=0.0)
    return replace(curve, x=[x + place * _DODGE * step for x in curve.x])


def places(num: int) -> list[float]:
    """Return num places from -0.5 to 0.5, evenly spaced; the middle for one."""
    return [index / (num - 1) - 0.5 for index in range(num)] if num > 1 else [0.0] * num


def late_values(curve: Curve) -> list[float]:
    """Return values that the limits of a loss axis hold: a curve without its beginning and its spikes.

    Returns:
        The medians of both ends of the band over each of NUM_PARTS parts of the run after SKIPPED_PART, and
        both at the last point.
    """
    last = max(curve.x, default=0.0)
    late = [index for index, x in enumerate(curve.x) if x >= SKIPPED_PART * last]
    size = math.ceil(len(late) / NUM_PARTS) or 1
    parts = [late[start : start + size] for start in range(0, len(late), size)]
    low, high = (
        [mean + sign * error for mean, error in zip(curve.mean, curve.error, strict=True)] for sign in (-1, 1)
    )
    return [
        statistics.median(end[i] for i in part) for part in [*parts, late[-1:]] if part for end in (low, high)
    ]


def limit_y(axes: Axes, values: Sequence[float]) -> None:
    """Limit the y axis to values with a margin, if there are any."""
    if values:
        axes.set_ylim(*padded(min(values), max(values), 0.08))
