"""Diagnostics in the report: by layer after the last step, over training, and by context length."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from eval.diagnostics import plots
from eval.diagnostics.families import Family
from eval.report.curves import Curve
from eval.report.diagnostics_arms import diagnostics_arms
from eval.report.diagnostics_table import diagnostics_table
from eval.report.plan_values import ArmRuns
from eval.report.rows import make_rows
from eval.report.run_records import read_run
from eval.report.styles import COLORS, Style, row_styles
from eval.report.writer import write_report
from tests.eval.report.run_folders import STEP_TOKENS, STEPS, diagnostics_record, launch, make_run, training


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two seeds of Parallax and a run of softmax attention."""
    made = []
    for name, ratio, words in (("a", 1.0, ()), ("b", 3.0, ("--run.seed", "1"))):
        folder = make_run(tmp_path / name, [launch(), *training(4.0)], *words)
        write(
            folder,
            [
                diagnostics_record(0, ratio, 2.0),
                diagnostics_record(20, ratio + 1, 3.0),
                diagnostics_record(STEPS, ratio + 2, 4.0),
            ],
        )
        made.append(folder)
    made.append(make_run(tmp_path / "s", [launch(), *training(4.1)], name="debug_softmax_muon"))
    write(made[-1], [diagnostics_record(0, None, 2.0), diagnostics_record(STEPS, None, 1.0)])
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


def test_the_table_of_arms_has_means_over_layers_and_seeds(folders: list[Path]) -> None:
    parallax, softmax = (
        ArmRuns(stage="x", name=name, config=name, values={}, other=None, runs=runs, others={})
        for name, runs in (
            ("parallax", {seed: read_run(folder) for seed, folder in enumerate(folders[:2])}),
            ("softmax", {0: read_run(folders[2])}),
        )
    )
    assert diagnostics_table([]) is None
    table = diagnostics_table([parallax, softmax])
    assert table is not None
    assert table.markdown() == [
        "| Arm | Seeds | ratio | entropy | rank Q |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| parallax | 2 | 4.5 ± 1 | 4.5 ± 0 | {40 + STEPS} ± 0 |",
        f"| softmax | 1 | - | 1.5 | {40 + STEPS} |",
    ]
    # a seed whose diagnostics are not there is said, and an arm without any has no line
    (folders[1] / "diagnostics.jsonl").unlink()
    (folders[2] / "diagnostics.jsonl").unlink()
    seeds = {seed: read_run(folder) for seed, folder in enumerate(folders[:2])}
    table = diagnostics_table(
        [replace(parallax, runs=seeds), replace(softmax, runs={0: read_run(folders[2])})]
    )
    assert table is not None
    assert table.markdown()[2:] == [f"| parallax | 2 | 3.5 (1 of 2) | 4.5 (1 of 2) | {40 + STEPS} (1 of 2) |"]


def test_the_table_of_arms_has_finished_runs_alone(folders: list[Path], tmp_path: Path) -> None:
    cut_off = make_run(tmp_path / "c", [launch(), *training(4.0)[:20]], "--run.seed", "2")
    write(cut_off, [diagnostics_record(20, 9.0, 9.0)])
    runs = {seed: read_run(folder) for seed, folder in enumerate([*folders[:2], cut_off])}
    arm = ArmRuns(stage="x", name="parallax", config="x", values={}, other=None, runs=runs, others={})
    table = diagnostics_table([arm, replace(arm, name="begun", runs={2: runs[2]})])
    assert table is not None
    ends = f"4.5 ± 1 (2 of 3) | 4.5 ± 0 (2 of 3) | {40 + STEPS} ± 0 (2 of 3)"
    assert table.markdown()[2:] == [f"| parallax | 3 | {ends} |"]


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
    write(
        trunk,
        [diagnostics_record(0, 1.0, 1.0), diagnostics_record(10, 2.0, 1.0), diagnostics_record(20, 3.0, 1.0)],
    )
    start = ("--checkpoint.start_from", str(trunk / "checkpoint" / "step-10"))
    branch = make_run(tmp_path / "branch", [launch(10), *training(4.0, first=11)], *start)
    write(branch, [diagnostics_record(20, 7.0, 1.0), diagnostics_record(STEPS, 8.0, 1.0)])
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
