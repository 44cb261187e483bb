"""The plot of the loss by context length."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from matplotlib.figure import Figure

from eval.text_loss_plot import plot_per_position


def test_the_loss_by_context_length_is_plotted_with_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bins = [SimpleNamespace(first=2**n, last=2 ** (n + 1) - 1, loss=8.0 - n / 2) for n in range(12)]
    result = cast(Any, SimpleNamespace(per_position=bins))
    plot_per_position(result, tmp_path / "x.png", "Loss of runs/x")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_per_position(result, tmp_path / "x.png", "Loss of runs/x")
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Context length (tokens)", "Loss (nats/token)")
    assert axes.get_title() == "Loss of runs/x"
    figures[0].draw_without_rendering()
    low, high = axes.get_xlim()
    ticks = [t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert ticks[:3] == ["1", "4", "16"]
    assert "1,024" in ticks
