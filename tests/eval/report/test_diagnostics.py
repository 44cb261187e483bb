"""Diagnostics in the report: by layer after the last step, over training, and by context length."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from eval.diagnostics import plots
from eval.diagnostics.families import Family
from eval.report.curves import Curve
from eval.report.diagnostics_arms import diagnostics_arms
from eval.report.rows import make_rows
from eval.report.run_records import read_run
from eval.report.styles import COLORS, Style, row_styles
from eval.report.writer import write_report
from tests.eval.report.run_folders import STEP_TOKENS, STEPS, launch, make_run, training


def record(step: int, ratio: float | None, entropy: float) -> dict[str, Any]:
    """A record of two layers with two heads each; the second layer's values are 1 larger."""
    layers = []
    for layer in (0, 1):
        heads: dict[str, Any] = {"entropy/mean": [entropy + layer - 0.5, entropy + layer + 0.5]}
        if ratio is not None:
            heads["correction_ratio/median"] = [ratio + layer, ratio + layer]
        context = {"entropy": {"mean": [entropy + layer, None], "stderr": [0.1, None]}}
        weights = {"wq": {"stable_rank": 40.0 + step, "spectral_norm": 2.0}}
        layers.append(
            {"layer": layer, "heads": heads, "by_context": context, "weights": weights, "gains": {}}
        )
    bounds = {"bounds": [[1, 16], [17, 32]], "num_queries": [3, 4]}
    return {"step": step, "tokens": step * STEP_TOKENS, "context": bounds, "layers": layers}


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two seeds of Parallax and a run of softmax attention."""
    made = []
    for name, ratio, words in (("a", 1.0, ()), ("b", 3.0, ("--run.seed", "1"))):
        folder = make_run(tmp_path / name, [launch(), *training(4.0)], *words)
        write(folder, [record(0, ratio, 2.0), record(20, ratio + 1, 3.0), record(STEPS, ratio + 2, 4.0)])
        made.append(folder)
    made.append(make_run(tmp_path / "s", [launch(), *training(4.1)], name="debug_softmax_muon"))
    write(made[-1], [record(0, None, 2.0), record(STEPS, None, 1.0)])
    return made


def test_arms_are_means_over_seeds_and_layers(folders: list[Path]) -> None:
    rows = make_rows([read_run(folder) for folder in folders])
    parallax, softmax = sorted(diagnostics_arms(rows, row_styles(rows)), key=lambda arm: arm.label)
    ratio = parallax.by_layer["correction_ratio/median"]
    assert (ratio.x, ratio.mean, ratio.num_seeds) == ([0, 1], [4.0, 5.0], 2)
    assert ratio.error == pytest.approx([1.0, 1.0])
    history = parallax.over_training["correction_ratio/median"]
    assert history.x == [0, 20 * STEP_TOKENS, STEPS * STEP_TOKENS]
    assert history.mean == [2.5, 3.5, 4.5]
    assert "correction_ratio/median" not in softmax.by_layer
    assert softmax.by_layer["entropy/mean"].mean == [1.0, 2.0]
    assert softmax.by_context["entropy"].x == [4.0]
    assert softmax.by_context["entropy"].mean == [1.5]


def test_the_report_shows_them_beside_the_losses(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Figure] = {}
    save = plots.save

    def keep(figure: Figure, path: Path) -> None:
        drawn[path.stem] = figure
        save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    out = tmp_path / "report"
    text = write_report(folders, baseline=None, out=out).read_text()
    assert "![Diagnostics: The correction](diagnostics_correction.png)" in text
    assert text.index("loss_tokens.png") < text.index("diagnostics_correction.png")
    assert {*drawn} == {
        *("diagnostics_correction", "diagnostics_sink", "diagnostics_stable_rank"),
        *("diagnostics_norms", "diagnostics_by_context"),
    }
    by_layer, over_training = drawn["diagnostics_correction"].axes
    assert by_layer.get_ylabel() == "Correction / softmax\noutput, median"
    assert [line.get_label() for line in by_layer.lines] == ["Parallax, Muon"]
    assert over_training.get_xlabel() == "Training tokens"
    (legend,) = drawn["diagnostics_sink"].legends
    assert {text.get_text() for text in legend.get_texts()} == {"Parallax, Muon", "Softmax, Muon"}
    # figures of an earlier report go with the records
    for folder in folders:
        (folder / "diagnostics.jsonl").unlink()
    assert "diagnostics" not in write_report(folders, baseline=None, out=out).read_text()
    assert not list(out.glob("diagnostics*"))


def test_a_branch_has_those_of_its_trunk(tmp_path: Path) -> None:
    trunk = make_run(tmp_path / "trunk", [launch(), *training(4.0)])
    write(trunk, [record(0, 1.0, 1.0), record(10, 2.0, 1.0), record(20, 3.0, 1.0)])
    start = ("--checkpoint.start_from", str(trunk / "checkpoint" / "step-10"))
    branch = make_run(tmp_path / "branch", [launch(10), *training(4.0, first=11)], *start)
    write(branch, [record(20, 7.0, 1.0), record(STEPS, 8.0, 1.0)])
    with (branch / "diagnostics.jsonl").open("a") as file:
        file.write('{"step": 31, "la')
    found = read_run(branch).diagnostics
    assert [each["step"] for each in found] == [0, 10, 20, STEPS]
    assert [each["values"][0]["correction_ratio/median"] for each in found] == [1.0, 2.0, 7.0, 8.0]


def test_axes_hold_bands_and_are_logarithmic_where_values_span_much(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    family = Family(file="x", title="X", names=("entropy/mean",))
    style = Style(color=COLORS[0], dash="solid", marker="o", is_main=True)
    for mean, scale in (([4.0, 5.0], "linear"), ([1.0, 100.0], "log"), ([0.0, 100.0], "linear")):
        curve = Curve(x=[0, 1], mean=mean, error=[0.5, 0.5], num_seeds=2)
        assert plots.plot_family(
            [plots.Arm(label="a", style=style, by_layer={"entropy/mean": curve})], family, tmp_path / "x.png"
        )
        axes = figures["x.png"].axes[0]
        assert axes.get_yscale() == scale
        low, high = axes.get_ylim()
        assert low <= max(0.0, mean[0] - 0.5)
        assert high >= mean[1] + 0.5
