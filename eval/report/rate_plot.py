"""The plot of the final loss against the learning rate, one line for each arm."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.figure import add_legend, format_log_axis, new_axes, save
from eval.report.curves import Curve
from eval.report.drawing import draw_points, places
from eval.report.rows import HIDDEN_RATE, Arm, Row, loss_of, rate_key
from eval.report.run_values import held_out_loss
from eval.report.styles import Style

_DODGE = 0.06  # part of a rate over which the points of all arms are spread


def rate_curve(arm: Arm, key: str, rows: Sequence[Row]) -> Curve:
    """Compute the final loss of an arm's rows by learning rate, over seeds.

    Args:
        arm: The arm; a row without a loss, such as one that diverged, or without that
            rate has no point.
        key: The learning rate.
        rows: All rows of the report, which decide on the loss: held-out or training.
    """
    loss = loss_of(rows)
    found = sorted(
        (
            (row.config[key], each)
            for row in arm.rows
            if key in row.config and (each := row.over_seeds(loss)) is not None
        ),
        key=lambda pair: pair[0],
    )
    return Curve(
        x=[rate for rate, _ in found],
        mean=[each.mean for _, each in found],
        error=[each.error or 0.0 for _, each in found],
        num_seeds=max((each.num_seeds for _, each in found), default=0),
    )


def plot_rates(arms: Sequence[Arm], styles: Mapping[str, Style], path: Path) -> bool:
    """Plot the final loss of each arm against the learning rate; the best of an arm is ringed.

    Args:
        arms: The arms.
        styles: Name of a row -> its style.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether any arm has a loss at two learning rates or more; without one no file is written.
    """
    rows = [row for arm in arms for row in arm.rows]
    key = rate_key(arms)
    curves = [] if key is None else [rate_curve(arm, key, rows) for arm in arms]
    if max((len(set(each.x)) for each in curves), default=0) < 2:
        return False
    kind = "Held-out" if loss_of(rows) is held_out_loss else "Training"
    figure, axes = new_axes(
        title=f"{kind} loss against learning rate",
        x="Peak learning rate of the hidden matrices"
        if key == HIDDEN_RATE
        else f"Peak learning rate ({key})",
        y=f"Final {kind.lower()} loss (nats/token)",
    )
    format_log_axis(axes, "x", [x for each in curves for x in each.x])
    for arm, each, place in zip(arms, curves, places(len(arms)), strict=True):
        if not each.x:
            continue
        style = styles[arm.best.name]
        # a part of the rate, which the log axis shows as the same distance everywhere
        moved = replace(each, x=[x * (1 + _DODGE * place) for x in each.x])
        draw_points(axes, moved, style, label=arm.name)
        if len(each.x) > 1:
            best = min(range(len(each.x)), key=lambda index: each.mean[index])
            ring: dict[str, Any] = {
                "facecolors": "none",
                "edgecolors": style.color,
                "linewidths": 1.2,
                "zorder": 4,
            }
            axes.scatter([moved.x[best]], [moved.mean[best]], s=90, **ring)
    add_legend(axes)
    save(figure, path)
    return True
