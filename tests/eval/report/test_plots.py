"""Plots as in a paper: what they say, in which colors, and that nothing in them lies on top of something."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.container import Container, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eval.figure import format_count
from eval.report import curves, drawing
from eval.report.curves import curve, difference_curve, running_mean, smoothed_loss_series
from eval.report.plots import plot_differences
from eval.report.rows import Row, make_rows, sort_rows
from eval.report.run_records import read_run
from eval.report.styles import COLORS, row_styles
from eval.report.writer import write_report
from tests.eval.report.run_folders import (
    STEP_TOKENS,
    STEPS,
    cells,
    held_out,
    launch,
    make_run,
    seeds,
    training,
)

BLUE, VERMILLION = "#0072B2", "#D55E00"


def axes_of(figure: Figure) -> Axes:
    (axes,) = figure.axes
    return axes


def line_of(figure: Figure, label: str) -> Line2D:
    return next(line for line in axes_of(figure).lines if line.get_label() == label)


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def marks_of(container: Container) -> list[float]:
    """Return the x of the points of error bars."""
    assert isinstance(container, ErrorbarContainer)
    return list(np.asarray(container.lines[0].get_xdata()))


def grid(tmp_path: Path) -> list[Path]:
    """Write runs of two attentions under two optimizers, three seeds each, one of them at three rates."""
    rate = "--optimizer.groups.hidden.lr"
    return [
        *seeds(tmp_path, "softmax", (2.50, 2.54, 2.52)),
        *seeds(tmp_path, "parallax", (2.40, 2.41, 2.42)),
        *seeds(tmp_path, "softmax", (2.60, 2.61, 2.65), rate, "0.002", optimizer="adamw"),
        *seeds(tmp_path, "parallax", (2.55, 2.55, 2.56), rate, "0.002", optimizer="adamw"),
        *seeds(tmp_path, "parallax", (2.45,), rate, "0.02"),
        *seeds(tmp_path, "parallax", (2.43,), rate, "0.005"),
    ]


@pytest.fixture
def drawn(tmp_path: Path, figures: dict[str, Figure]) -> dict[str, Figure]:
    write_report(grid(tmp_path), baseline="softmax_muon_0", out=tmp_path / "out")
    return {name.removesuffix(".png"): figure for name, figure in figures.items() if name.endswith(".png")}


def test_plots_are_written_as_png_and_as_pdf_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    text = write_report(grid(tmp_path), baseline="softmax_muon_0", out=tmp_path / "out").read_text()
    names = re.findall(r"\]\((\w+)\.png\)", text)
    losses = ["loss_tokens", "loss_flops", "loss_seconds"]
    assert names == [*losses, "held_out", "differences", "learning_rates", "gradient_norm"]
    images = [(tmp_path / "out" / f"{name}.png").read_bytes() for name in names]
    assert all(image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) > 5000 for image in images)
    assert len(set(images)) == len(images)
    for name in names:
        pdf = (tmp_path / "out" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        # fonts as outlines that can be edited, no bitmap of the plot
        assert b"/FontFile2" in pdf
        assert b"/Subtype /Image" not in pdf
        assert b"CreationDate" not in pdf


def test_titles_and_labels_are_in_sentence_case_with_units(drawn: dict[str, Figure]) -> None:
    labels = {name: (axes_of(f).get_xlabel(), axes_of(f).get_ylabel()) for name, f in drawn.items()}
    assert labels == {
        "loss_tokens": ("Training tokens", "Training loss (nats/token)"),
        "loss_flops": ("Training compute ($10^{5}$ FLOPs)", "Training loss (nats/token)"),
        "loss_seconds": ("Training time (seconds)", "Training loss (nats/token)"),
        "held_out": ("Training tokens", "Held-out loss (nats/token)"),
        "differences": ("Training tokens", "Difference in loss (nats/token)"),
        "learning_rates": ("Peak learning rate of the hidden matrices", "Final held-out loss (nats/token)"),
        "gradient_norm": ("Training tokens", "Gradient norm"),
    }
    for figure in drawn.values():
        assert re.fullmatch(r"[A-Z][a-z].*[^.]", axes_of(figure).get_title())
    assert axes_of(drawn["differences"]).get_title() == "Loss minus that of Softmax, Muon, lr 0.01"


def test_ticks_are_counts_as_people_write_them(drawn: dict[str, Figure]) -> None:
    values = (0, 500, 1000, 20_000, 2500, 1_500_000, 2e9, 3e12, 999_999.99, -20_000)
    texts = ["0", "500", "1k", "20k", "2.5k", "1.5M", "2B", "3T", "1M", "-20k"]
    assert [format_count(value) for value in values] == texts
    drawn["loss_tokens"].draw_without_rendering()
    axes = axes_of(drawn["loss_tokens"])
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks[:3] == ["0", "2k", "4k"]
    # loss against rates, on a log axis
    drawn["learning_rates"].draw_without_rendering()
    axes = axes_of(drawn["learning_rates"])
    low, high = axes.get_xlim()
    shown = [t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert shown == ["0.002", "0.005", "0.01", "0.02"]


def test_color_tells_the_attention_and_line_style_the_optimizer_in_all_plots(
    drawn: dict[str, Figure],
) -> None:
    looks: dict[str, set[tuple[str, str]]] = {}
    for figure in drawn.values():
        for line in axes_of(figure).lines:
            name = re.sub(r" \(\d+ peaks?\)|, lr .*", "", str(line.get_label()))
            if name.startswith(("Softmax", "Parallax")):
                looks.setdefault(name, set()).add((str(line.get_color()), str(line.get_linestyle())))
    assert looks == {
        "Softmax, Muon": {(BLUE, "-")},
        "Parallax, Muon": {(VERMILLION, "-")},
        "Softmax, AdamW": {(BLUE, "--")},
        "Parallax, AdamW": {(VERMILLION, "--")},
    }


def test_colors_are_told_apart_by_readers_who_see_two_primary_colors() -> None:
    # protanopia, deuteranopia, tritanopia in linear RGB: Machado, Oliveira and Fernandes 2009, severity 1
    views = {
        "all": np.eye(3),
        "protan": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        "deutan": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
        "tritan": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9309, 0.1476], [0.0047, 0.6914, 0.3039]],
    }
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    rgb = np.array([to_rgb(color) for color in COLORS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for name, view in views.items():
        seen = np.clip(linear @ np.array(view).T, 0, 1) @ to_xyz.T / to_xyz.sum(axis=1)
        root = np.where(seen > 0.008856, np.cbrt(seen), 7.787 * seen + 16 / 116)
        x, y, z = root.T
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
        distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab, 2)]
        # 2.3 is just noticeable side by side; thin lines need much more
        assert min(distances) > 15, name
        assert lab[:, 0].max() < 75  # on white


def test_a_row_of_several_seeds_is_a_mean_with_a_band_of_its_standard_error(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    folders = [*seeds(tmp_path, "softmax", (2.0, 2.1, 2.6)), *seeds(tmp_path, "parallax", (2.4,))]
    write_report(folders, baseline=None, out=tmp_path / "out")
    figure = figures["loss_tokens.png"]
    assert len(axes_of(figure).lines) == 2
    line = line_of(figure, "Softmax, Muon")
    x, mean = map(np.asarray, line.get_data())
    assert list(x) == [STEP_TOKENS * step for step in range(1, STEPS + 1)]
    assert mean[-1] == pytest.approx(np.mean([2.5, 2.6, 3.1]))
    (band,) = axes_of(figure).collections
    ends = np.asarray(band.get_paths()[0].vertices)
    at_last = [y for x, y in ends if x == STEPS * STEP_TOKENS]
    error = np.std([2.0, 2.1, 2.6], ddof=1) / np.sqrt(3)
    assert (min(at_last), max(at_last)) == pytest.approx((mean[-1] - error, mean[-1] + error))
    assert tuple(np.asarray(band.get_facecolor())[0, :3]) == pytest.approx(to_rgb(BLUE), abs=1e-6)


def test_worse_learning_rates_are_faint_and_in_the_legend_once(drawn: dict[str, Figure]) -> None:
    main = ["Softmax, Muon", "Parallax, Muon", "Parallax, AdamW", "Softmax, AdamW"]
    best = [f"{name}, lr {'0.002' if 'AdamW' in name else '0.01'}" for name in main]
    assert legend_of(drawn["loss_tokens"]) == [*best, "Other learning rates"]
    assert legend_of(drawn["learning_rates"]) == main
    lines = axes_of(drawn["loss_tokens"]).lines
    faint = [line for line in lines if line.get_alpha() == 0.3]
    assert len(faint) == 2
    assert all(line.get_color() == VERMILLION and line.get_linewidth() < 1 for line in faint)


def test_the_legend_lies_below_the_axes(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, outer = legend.get_window_extent(), axes_of(figure).get_tightbbox()
        assert outer is not None
        assert box.y1 <= outer.y0
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_error_bars_of_rows_at_the_same_tokens_stand_apart(drawn: dict[str, Figure]) -> None:
    for name, num in (("differences", 3), ("learning_rates", 4)):
        containers = axes_of(drawn[name]).containers
        assert len(containers) == num
        places = [float(x) for each in containers for x in marks_of(each)]
        assert len(set(places)) == len(places), name
    # by less than the distance of two evaluations, and none for the loss before training
    assert [len(marks_of(each)) for each in axes_of(drawn["differences"]).containers] == [2, 2, 2]
    places = [marks_of(each)[-1] for each in axes_of(drawn["differences"]).containers]
    assert max(places) - min(places) < 0.2 * 15 * STEP_TOKENS


def test_one_spike_does_not_set_the_limits_of_the_loss(tmp_path: Path, figures: dict[str, Figure]) -> None:
    records = training(2.0, last=400)
    steps = [{**r, "loss": 2.0 + 2.0 / r["step"] + (50 if r["step"] == 300 else 0)} for r in records]
    words = ("--training.steps", "400")
    write_report([make_run(tmp_path / "a", [launch(), *steps], *words)], baseline=None, out=tmp_path / "out")
    low, high = axes_of(figures["loss_tokens.png"]).get_ylim()
    assert 1.9 < low < 2.0 + 2.0 / 400
    assert high < 2.0 + 50 / 8 + 0.5


def test_peaks_of_all_seeds_are_marked_and_counted(tmp_path: Path, figures: dict[str, Figure]) -> None:
    folders = []
    for seed, at in enumerate(((30,), (40, 50))):
        steps = [{**r, "grad_norm": 7.0 if r["step"] in at else 0.5} for r in training(2.0, last=60)]
        words = ("--training.steps", "60", "--run.seed", str(seed), "--data.shuffle_seed", str(seed))
        folders.append(make_run(tmp_path / str(seed), [launch(), *steps], *words))
    text = write_report(folders, baseline=None, out=tmp_path / "out").read_text()
    assert cells(text, "Results", "Parallax, Muon")["Gradient peaks above 3 times the median"] == "1.5 ± 0.5"
    assert "a step of more than 3 times the median of the 100 steps before it" in text
    figure = figures["gradient_norm.png"]
    line = line_of(figure, "Parallax, Muon (3 peaks)")
    assert set(np.asarray(line.get_ydata())) == {0.5}
    (marks,) = (line for line in axes_of(figure).lines if len(np.asarray(line.get_xdata())) == 3)
    assert list(np.asarray(marks.get_xdata())) == [at * STEP_TOKENS for at in (30, 40, 50)]
    assert set(np.asarray(marks.get_ydata())) == {7.0}
    assert (marks.get_marker(), marks.get_linestyle()) == ("^", "None")
    assert axes_of(figure).get_yscale() == "log"
    low, high = axes_of(figure).get_ylim()
    assert low < 0.5 < 7.0 < high


def test_the_best_learning_rate_of_an_arm_is_ringed(drawn: dict[str, Figure]) -> None:
    axes = axes_of(drawn["learning_rates"])
    (ring,) = (each for each in axes.collections if isinstance(each, PathCollection))
    x, y = np.asarray(ring.get_offsets())[0]
    assert y == pytest.approx(2.41)
    assert x == pytest.approx(0.01, rel=0.05)


def test_a_running_mean_is_over_the_last_values() -> None:
    assert running_mean([1.0, 2.0, 3.0, 7.0], 2) == [1.0, 1.5, 2.5, 5.0]


def test_an_unfinished_run_of_the_same_losses_is_not_plotted_as_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Figure]
) -> None:
    monkeypatch.setattr(curves, "SMOOTHED_PART", 5)
    whole = make_run(tmp_path / "whole", [launch(), *training(2.0)])
    half = make_run(tmp_path / "half", [launch(), *training(2.0, last=10)], "--model.attention.gate", "head")
    runs = [read_run(folder) for folder in (whole, half)]
    series = [smoothed_loss_series(run) for run in runs]
    assert list(series[0].values())[:10] == list(series[1].values())
    rows = make_rows(runs)
    assert plot_differences(rows, row_styles(rows), rows[0], tmp_path / "differences.png")
    assert (
        list(np.asarray(line_of(figures["differences.png"], f"{rows[1].name} (1 pair)").get_ydata()))
        == [0.0] * 10
    )


def test_a_curve_is_over_the_finished_seeds(tmp_path: Path) -> None:
    folders = seeds(tmp_path, "softmax", (2.0, 2.2))
    words = ("--run.seed", "7", "--data.shuffle_seed", "7")
    folders.append(
        make_run(tmp_path / "c", [launch(), *training(9.0, last=4)], *words, name="debug_softmax_muon")
    )
    (row,) = make_rows([read_run(folder) for folder in folders])
    assert len(row.runs) == 3
    found = curve(row, smoothed_loss_series)
    assert found.num_seeds == 2
    assert found.mean[-1] == pytest.approx(2.6)
    # none is finished: as far as all came
    row = Row(name="c", runs=[read_run(folders[2])])
    assert len(curve(row, smoothed_loss_series).x) == 4


def test_the_error_of_a_smoothed_difference_is_that_of_smoothed_runs(tmp_path: Path) -> None:
    """Noise that changes sign from step to step averages out in each seed."""
    folders = []
    for seed, sign in enumerate((1, -1)):
        steps = [{**r, "loss": r["loss"] + sign * (-1) ** r["step"]} for r in training(2.0, last=400)]
        words = ("--run.seed", str(seed), "--data.shuffle_seed", str(seed), "--training.steps", "400")
        folders.append(make_run(tmp_path / f"noisy{seed}", [launch(), *steps], *words))
        base = [launch(), *training(2.0, last=400)]
        folders.append(make_run(tmp_path / f"base{seed}", base, *words, name="debug_softmax_muon"))
    noisy, base = make_rows([read_run(folder) for folder in folders])
    found = difference_curve(noisy.runs, base.runs, curves.loss_series, smoothed=True)
    assert 400 // curves.SMOOTHED_PART % 2 == 0
    assert found.error[100:] == pytest.approx([0.0] * 300, abs=1e-9)
    assert found.mean == pytest.approx([0.0] * 400, abs=1e-9)


def test_a_held_out_loss_before_training_is_no_point(tmp_path: Path, figures: dict[str, Figure]) -> None:
    folder = make_run(
        tmp_path / "a", [launch(), held_out(0, 9.0), *training(2.0), held_out(15, 3.0), held_out(STEPS, 2)]
    )
    write_report([folder], baseline=None, out=tmp_path / "out")
    line = line_of(figures["held_out.png"], "Parallax, Muon")
    assert list(np.asarray(line.get_ydata())) == [3.0, 2.0]
    low, high = axes_of(figures["held_out.png"]).get_ylim()
    assert 1.9 < low < 2.0 < 3.0 < high < 3.1
    assert drawing.late_values(curve(sort_rows(make_rows([read_run(folder)]), None)[0], smoothed_loss_series))


def test_a_value_of_0_is_not_hidden_by_a_log_axis(tmp_path: Path, figures: dict[str, Figure]) -> None:
    rate = "--optimizer.groups.hidden.lr"
    folders = [seeds(tmp_path, "softmax", (loss,), rate, lr)[0] for lr, loss in (("0.0", 2.5), ("0.01", 2.1))]
    flat = [{**record, "grad_norm": 0.0} for record in training(2.0)]
    folders.append(make_run(tmp_path / "flat", [launch(), *flat, held_out(STEPS, 2.0)]))
    write_report(folders, baseline=None, out=tmp_path / "out")
    for name, axis in (("learning_rates", "x"), ("gradient_norm", "y")):
        axes = axes_of(figures[f"{name}.png"])
        assert (axes.get_xscale() if axis == "x" else axes.get_yscale()) == "linear"
        low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
        assert low <= 0 < high
