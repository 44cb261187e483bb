"""Plot of the loss on text by context length."""

import math
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from eval.figure import new_axes, save
from eval.text_loss import TextLoss


def plot_per_position(result: TextLoss, path: Path, title: str) -> None:
    """Plot the loss against the context length, as PNG and PDF.

    Args:
        result: From text_loss.
        path: The PNG.
        title: Title of the plot.
    """
    figure, axes = new_axes(title=title, x="Context length (tokens)", y="Loss (nats/token)")
    # geometric middle of each bin
    lengths = [math.sqrt(each.first * each.last) for each in result.per_position]
    axes.plot(lengths, [each.loss for each in result.per_position], marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    save(figure, path)
