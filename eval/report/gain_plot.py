"""Plots of gains: each arm of a plan minus the one it is compared with, at the end and over training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from eval.figure import add_legend, label_axes, new_panels, save
from eval.report.plan_values import ArmRuns
from eval.report.plots import plot_loss_differences
from eval.report.rows import Row
from eval.report.run_values import Value, average_held_out_loss, held_out_loss, loss_before_decay
from eval.report.styles import COLORS, row_styles

_INCHES = 0.2  # of a line
_OWN_COLOR = 1  # Parallax's, for the first arm
_OFFSET = 0.22  # of the points of one line, in lines


class _Look(NamedTuple):
    """How a loss is drawn."""

    label: str
    value: Value
    place: int
    marker: str
    color: str
    face: str


_LOOKS = (
    _Look("Before the decay", loss_before_decay, -1, "o", "#0072B2", "white"),
    _Look("After the last step", held_out_loss, 0, "o", "#D55E00", "#D55E00"),
    _Look("After it, average of the weights", average_held_out_loss, 1, "D", "#009E73", "#009E73"),
)


def plot_gains(arms: Sequence[ArmRuns], path: Path) -> bool:
    """Plot the differences of arms to those that they are compared with, grouped by stage.

    A point that is over only n of an arm's m seeds has "n of m" beside it.

    Args:
        arms: The arms of all stages, in the order of the plan.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any arm has a difference; without one no file is written.
    """
    drawn = [arm for arm in arms if any(arm.gain(value) is not None for _, value, *_ in _LOOKS)]
    if not drawn:
        return False
    places, height = [], 0.0
    for index, arm in enumerate(drawn):
        height += 1.8 if index and arm.stage != drawn[index - 1].stage else 1.0
        places.append(height)
    figure, ((axes,),) = new_panels(1, 1, size=(7.4, 1.1 + _INCHES * (height + 1.8)))
    for look in _LOOKS:
        found = [
            (y + _OFFSET * look.place, arm.gain(look.value)) for y, arm in zip(places, drawn, strict=True)
        ]
        points = [(y, each.mean, each.error or 0.0) for y, each in found if each is not None]
        for (y, each), arm in zip(found, drawn, strict=True):
            if each is not None and each.num_seeds < len(arm.runs):
                text, at = f"{each.num_seeds} of {len(arm.runs)}", (each.mean - (each.error or 0.0), y)
                axes.annotate(
                    text, at, xytext=(-4, 0), textcoords="offset points", ha="right", va="center", fontsize=6
                )
        if points:
            ys, xs, errors = zip(*points, strict=True)
            axes.errorbar(
                xs,
                ys,
                xerr=errors,
                label=look.label,
                fmt=look.marker,
                markersize=4.5,
                elinewidth=1.0,
                color=look.color,
                markerfacecolor=look.face,
            )
    axes.axvline(0.0, color="#333333", linewidth=0.8)
    axes.set_yticks(places, [arm.name for arm in drawn])
    axes.set_title("Held-out loss minus that of the arm it is compared with", fontsize=11)
    label_axes(axes, x="Difference (nats/token)", y="")
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.set_ylim(height + 1.0, -0.4)
    beside = axes.get_yaxis_transform()
    for index, (place, arm) in enumerate(zip(places, drawn, strict=True)):
        if not index or arm.stage != drawn[index - 1].stage:
            axes.text(0.01, place - 0.75, arm.stage, fontsize=8, weight="bold", transform=beside)
    add_legend(axes)
    save(figure, path)
    return True


def plot_gains_over_training(arms: Sequence[ArmRuns], path: Path) -> bool:
    """Plot the differences of a stage's arms to those that they are compared with against tokens.

    Args:
        arms: The arms.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any arm has a difference; without one no file is written.
    """
    compared = [
        (arm.name, [run for run, _ in pairs], [other for _, other in pairs])
        for arm in arms
        if (pairs := arm.pairs())
    ]
    styles = row_styles([Row(name=name, runs=runs) for name, runs, _ in compared])
    # other learning rates have no others: every row is drawn in full
    styles = {name: replace(style, is_main=True) for name, style in styles.items()}
    if len({style.color for style in styles.values()}) == 1:  # of one model: colors tell the optimizers
        styles = {
            name: replace(style, color=COLORS[index % len(COLORS)])
            for index, (name, style) in enumerate(styles.items(), _OWN_COLOR)
        }
    return plot_loss_differences(compared, styles, "Loss minus that of the arm it is compared with", path)
