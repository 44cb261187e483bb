"""Figures as in a paper: ticks such as 20k, a legend below the curves, PNG with a vector PDF beside it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_LOG_TICKS = ((100, (1.0, 2.0, 5.0)), (10_000, (1.0, 3.0)))  # ratio of the values up to which ticks are these
_INK = "#333333"
_DPI = 150
_NUM_COLORS = 64


def format_count(value: float) -> str:
    """Format a count for a tick: 500, 20k, 1.5M, 2B, 3T."""
    rounded = float(f"{value:.4g}")
    for size, unit in _UNITS:
        if abs(rounded) >= size:
            return f"{rounded / size:g}{unit}"
    return f"{rounded:g}"


def format_counts(axes: Axes) -> None:
    """Format the ticks of the x axis as counts, few enough to stand apart."""
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def format_log_axis(axes: Axes, name: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic, with ticks such as 0.01, 0.02, 0.05; not where it would hide a value.

    Args:
        axes: The axes.
        name: Which axis.
        values: What is shown on it; with one of 0 or less the axis stays linear.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0:
        return
    low, high = min(finite), max(finite)
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low / 1.25, high * 1.25)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    subs = next((subs for ratio, subs in _LOG_TICKS if high / low <= ratio), (1.0,))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def new_axes(*, title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Create a figure with one pair of axes.

    Args:
        title: Title, in sentence case.
        x: Label of the x axis, in sentence case, with its unit in parentheses.
        y: Label of the y axis, likewise.
    """
    figure, ((axes,),) = new_panels(1, 1, size=(6.4, 4.2))
    axes.set_title(title, fontsize=11)
    label_axes(axes, x=x, y=y)
    return figure, axes


def new_panels(
    num_rows: int, num_columns: int, *, size: tuple[float, float]
) -> tuple[Figure, list[list[Axes]]]:
    """Create a figure with a grid of axes.

    Args:
        num_rows: Rows of the grid.
        num_columns: Columns of the grid.
        size: Width and height in inches.

    Returns:
        The figure, and its axes row by row.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    return figure, [list(row) for row in grid]


def label_axes(axes: Axes, *, x: str, y: str) -> None:
    """Label axes and give them the look of all figures: a faint grid, no frame above and to the right."""
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9, color=_INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def add_legend(*panels: Axes) -> None:
    """Add a legend below all axes of a figure, where it covers no curve, in as many columns as fit."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    labels, handles = list(found), list(found.values())
    figure = panels[0].get_figure()
    assert isinstance(figure, Figure)
    width = 0.75 + 0.064 * max(map(len, labels))  # of a column in inches
    num_columns = max(1, min(len(labels), int(figure.get_figwidth() / width)))
    # the legend takes its height below the axes, not from them
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.19 * math.ceil(len(labels) / num_columns))
    look: dict[str, Any] = {"fontsize": 9, "frameon": False, "handlelength": 2.8, "columnspacing": 1.5}
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, **look)


def save(figure: Figure, path: Path) -> None:
    """Save a figure as PNG of few bytes, and as PDF with fonts that can be edited beside it.

    Args:
        figure: The figure.
        path: The PNG; the PDF has the same name and the ending .pdf.
    """
    figure.savefig(path, dpi=_DPI)
    if not any(axes.images for axes in figure.axes):  # a scale of colors needs them all
        shrink_png(path)
    # no time of creation: the same records give the same file
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def shrink_png(path: Path) -> None:
    """Save a PNG with a palette, which takes a quarter of the bytes."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(_NUM_COLORS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def padded(low: float, high: float, part: float = 0.05) -> tuple[float, float]:
    """Return limits of an axis with a margin of a part of their distance on both sides."""
    margin = part * (high - low) or max(0.1 * abs(high), 1e-3)
    return low - margin, high + margin
