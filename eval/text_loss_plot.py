"""Plot of the loss on text by context length."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.text_loss import TextLoss


def plot_per_position(result: TextLoss, path: Path, title: str) -> None:
    """Plot the loss against the context length, as PNG.

    Args:
        result: From text_loss.
        path: The file.
        title: Title of the plot.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # geometric middle of each bin
    lengths = [math.sqrt(each.first * each.last) for each in result.per_position]
    axes.plot(lengths, [each.loss for each in result.per_position], marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="context length, tokens", ylabel="loss, nats/token", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
