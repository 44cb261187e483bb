"""Figures of diagnostics: values by layer and over training, and by context length, one line per arm."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eval.diagnostics.families import Family, shown_names
from eval.diagnostics.quantities import QUANTITIES, label_of
from eval.figure import add_legend, format_counts, format_log_axis, label_axes, new_panels, padded, save
from eval.report.curves import Curve
from eval.report.drawing import draw_curve
from eval.report.styles import Style

_PANEL = (3.7, 2.3)  # inches
_LOG_RATIO = 50


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is drawn of a model, or of the mean over the seeds of a row.

    Attributes:
        label: Its name in the legend.
        style: Its look.
        by_layer: Name of a value -> the value against the layer, after the last step.
        over_training: Name of a value -> its mean over layers against the tokens trained on.
        by_context: Quantity -> its mean over heads and layers against the context length.
    """

    label: str
    style: Style
    by_layer: Mapping[str, Curve]
    over_training: Mapping[str, Curve] = field(default_factory=dict)
    by_context: Mapping[str, Curve] = field(default_factory=dict)


def plot_family(arms: Sequence[Arm], family: Family, path: Path) -> bool:
    """Plot the values of a family: on the left by layer, on the right their means over layers over training.

    Args:
        arms: The arms; one without a value is left out of its panels.
        family: The values.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any arm has any of the values; without one no file is written.
    """
    names = shown_names(family, {name for arm in arms for name in arm.by_layer})
    if not names:
        return False
    has_history = any(len(curve.x) > 1 for arm in arms for curve in arm.over_training.values())
    figure, panels = _two_columns(len(names) * (2 if has_history else 1), family.title)
    left = panels[::2] if has_history else panels
    for index, (name, axes) in enumerate(zip(names, left, strict=False)):
        is_lowest = index >= len(names) - (1 if has_history else 2)
        _draw(axes, arms, {arm.label: arm.by_layer.get(name) for arm in arms}, marked=True)
        label_axes(axes, x="Layer" if is_lowest else "", y=_wrapped(label_of(name)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if has_history:
            beside = panels[2 * index + 1]
            _draw(beside, arms, {arm.label: arm.over_training.get(name) for arm in arms})
            label_axes(beside, x="Training tokens" if is_lowest else "", y="")
            beside.set_title("Mean over layers" if index == 0 else "", fontsize=10)
            format_counts(beside)
    add_legend(*panels)
    save(figure, path)
    return True


def plot_by_context(arms: Sequence[Arm], path: Path) -> bool:
    """Plot quantities against the number of tokens of the document so far, means over heads and layers.

    Args:
        arms: The arms.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any arm has any of the quantities; without one no file is written.
    """
    names = [name for name in QUANTITIES if any(name in arm.by_context for arm in arms)]
    if not names:
        return False
    figure, panels = _two_columns(len(names), "By context length")
    for name, axes in zip(names, panels, strict=False):
        _draw(axes, arms, {arm.label: arm.by_context.get(name) for arm in arms}, marked=True)
        is_lowest = name in names[-2:]
        label_axes(axes, x="Context length (tokens)" if is_lowest else "", y=_wrapped(QUANTITIES[name].label))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    add_legend(*panels)
    save(figure, path)
    return True


def _two_columns(num_panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """Create a figure with panels in two columns, row by row; an odd one out stands alone in its row."""
    num_rows = -(-num_panels // 2)
    figure, grid = new_panels(num_rows, 2, size=(2 * _PANEL[0], _PANEL[1] * num_rows + 0.4))
    figure.suptitle(title, fontsize=11)
    panels = [axes for row in grid for axes in row]
    for axes in panels[num_panels:]:
        axes.set_axis_off()
    return figure, panels[:num_panels]


def _draw(
    axes: Axes, arms: Sequence[Arm], curves: Mapping[str, Curve | None], *, marked: bool = False
) -> None:
    """Draw one value of every arm that has it.

    The y axis is logarithmic where values differ by more than _LOG_RATIO, and begins at 0 where they come
    near it.
    """
    values: list[float] = []
    for arm in arms:
        curve = curves[arm.label]
        if curve is not None and curve.x:
            draw_curve(axes, curve, arm.style, label=arm.label, marked=marked)
            ends = (
                mean + sign * error
                for mean, error in zip(curve.mean, curve.error, strict=True)
                for sign in (-1, 1)
            )
            values += [value for value in ends if math.isfinite(value)]
    if values and 0 < min(values) < max(values) / _LOG_RATIO:
        format_log_axis(axes, "y", values)
    elif values:
        low, high = min(values), max(values)
        if 0 <= low < 0.5 * high:
            low = 0.0
        bottom, top = padded(low, high)
        axes.set_ylim(0.0 if low == 0.0 else bottom, top)


def _wrapped(label: str) -> str:
    """Break a long label after its middle word."""
    if len(label) <= 28:
        return label
    words = label.split(" ")
    split = min(
        range(1, len(words)),
        key=lambda index: abs(len(" ".join(words[:index])) - len(label) / 2),
        default=len(words),
    )
    return " ".join(words[:split]) + "\n" + " ".join(words[split:])
