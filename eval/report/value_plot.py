"""The plot of gains against an axis of a stage, such as an initial value or the length of rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.figure import add_legend, format_log_axis, new_axes, save
from eval.report.curves import Curve
from eval.report.drawing import draw_points
from eval.report.plan_values import ArmRuns
from eval.report.run_values import held_out_loss
from eval.report.seed_statistics import Estimate
from eval.report.styles import COLORS, MARKERS, Style

_OWN_COLOR = 1  # Parallax's, for the first config
_LOG_RATIO = 5.0  # of the values from which on the axis is logarithmic


def plot_gains_by_value(arms: Sequence[ArmRuns], path: Path) -> bool:
    """Plot the differences of a stage's arms to those that they are compared with, one line for each config.

    The x axis is the axis of the stage that is not tuned and whose values are numbers, or lists of them, of
    which the first counts.

    Args:
        arms: The arms of a stage.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether there is one such axis, and a config with differences at two of its values or more; otherwise
        no file is written.
    """
    names = {name for arm in arms for name in arm.values}
    lines = {name: found for name in names if (found := _lines(arms, name))}
    if len(lines) != 1:
        return False
    ((name, curves),) = lines.items()
    values = sorted({x for curve in curves.values() for x in curve.x})
    figure, axes = new_axes(
        title="Held-out loss minus that of the arm it is compared with",
        x=name,
        y="Difference (nats/token)",
    )
    if values[0] > 0 and values[-1] >= _LOG_RATIO * values[0]:
        format_log_axis(axes, "x", values)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.axhline(0.0, color="#333333", linewidth=0.8)
    for index, (config, curve) in enumerate(curves.items()):
        color, marker = COLORS[(index + _OWN_COLOR) % len(COLORS)], MARKERS[index % len(MARKERS)]
        style = Style(color=color, dash="solid", marker=marker, is_main=True)
        draw_points(axes, curve, style, label=config)
    add_legend(axes)
    save(figure, path)
    return True


def _lines(arms: Sequence[ArmRuns], name: str) -> dict[str, Curve]:
    """Return config -> differences by the value of an axis, of those with two values or more."""
    by_config: dict[str, list[tuple[float, Estimate]]] = {}
    for arm in arms:
        x, gain = _number(arm.values.get(name)), arm.gain(held_out_loss)
        if x is not None and gain is not None:
            by_config.setdefault(arm.config, []).append((x, gain))
    return {
        config: _curve(sorted(points, key=lambda point: point[0]))
        for config, points in by_config.items()
        if len({x for x, _ in points}) > 1
    }


def _curve(points: Sequence[tuple[float, Estimate]]) -> Curve:
    return Curve(
        x=[x for x, _ in points],
        mean=[gain.mean for _, gain in points],
        error=[gain.error or 0.0 for _, gain in points],
        num_seeds=max(gain.num_seeds for _, gain in points),
    )


def _number(value: Any) -> float | None:
    """Return a value of an axis as a number; None where it is none."""
    first = value[0] if isinstance(value, list) and value else value
    return float(first) if isinstance(first, int | float) and not isinstance(first, bool) else None
