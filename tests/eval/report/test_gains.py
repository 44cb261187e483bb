"""Gains of a plan's arms: before and after the decay, of averages, of branches; pages with figures."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from errors import UserError
from eval.report import __main__
from eval.report.gain_plot import plot_gains, plot_gains_over_training
from eval.report.plan_file import PlanFile, PlannedRun, PlannedStage, read_plan
from eval.report.plan_report import write_plan_report
from eval.report.plan_values import arms_of
from eval.report.run_records import RunRecord, read_run
from eval.report.run_values import (
    average_held_out_loss,
    average_loss_before_decay,
    held_out_loss,
    loss_before_decay,
    own_device_hours,
    own_tokens,
)
from eval.report.styles import COLORS
from eval.report.value_plot import plot_gains_by_value
from tests.eval.report.run_folders import (
    STEP_TOKENS,
    STEPS,
    cells,
    held_out,
    launch,
    make_run,
    rows_of,
    training,
)

BEFORE = 22  # of 30 steps, the decay of the debug configs takes the last 8
# softmax and Parallax, at both seeds: before the decay, at the end, and of the average
LOSSES = {
    "softmax": ((3.5, 3.0, 3.1), (3.6, 3.2, 3.3)),
    "parallax": ((3.4, 2.98, 3.04), (3.46, 3.16, 3.2)),
}


def evaluated(step: int, loss: float, average: float) -> dict[str, float]:
    return {
        "step": step,
        "validation_loss": loss,
        "average_validation_loss": average,
        "validation_tokens": 500,
    }


def make_plan(folder: Path) -> PlanFile:
    """Write a plan: a stage of two attentions and seeds, and branches of the first seed without a decay."""
    (folder / "seeds").mkdir(parents=True)
    (folder / "no_decay").mkdir()
    members, branches = [], []
    for kind, of_seeds in LOSSES.items():
        for seed, (before, end, average) in enumerate(of_seeds, 1):
            name = f"{kind}_seed{seed}"
            records = [launch(), *training(end), evaluated(BEFORE, before, average + 0.5)]
            words = ("--run.seed", str(seed), "--data.shuffle_seed", str(seed))
            make_run(
                folder / "seeds" / name,
                [*records, evaluated(STEPS, end, average)],
                *words,
                name=f"debug_{kind}_muon",
            )
            other = f"seeds/softmax_seed{seed}" if kind == "parallax" else None
            members.append(
                PlannedRun(
                    number=len(members),
                    config="x",
                    run=f"seeds/{name}",
                    arm=kind,
                    seed=seed,
                    compared_with=other,
                )
            )
            if seed == 1:
                start = folder / "seeds" / name / "checkpoint" / f"step-{BEFORE}"
                own = ("--schedule.decay_ratio", "0", "--checkpoint.start_from", str(start))
                last = evaluated(STEPS, end + 0.4, average + 0.2)
                records = [launch(BEFORE), *training(end, BEFORE + 1), last]
                make_run(folder / "no_decay" / name, records, *words, *own, name=f"debug_{kind}_muon")
                other = "no_decay/softmax_seed1" if kind == "parallax" else None
                branches.append(
                    PlannedRun(
                        number=4 + len(branches),
                        config="x",
                        run=f"no_decay/{name}",
                        arm=kind,
                        seed=1,
                        compared_with=other,
                    )
                )
    stages = [PlannedStage(name="seeds", members=members), PlannedStage(name="no_decay", members=branches)]
    plan = PlanFile(baseline="softmax", stages=stages)
    plan.write(folder)
    return plan


def runs_of(folder: Path, plan: PlanFile) -> dict[str, RunRecord]:
    paths = [member.run for stage in plan.stages for member in stage.members]
    return {path: read_run(folder / path) for path in paths if path is not None}


def test_losses_before_the_decay_are_of_its_first_step_or_of_where_a_branch_starts(tmp_path: Path) -> None:
    runs = runs_of(tmp_path / "x", make_plan(tmp_path / "x"))
    run, branch = runs["seeds/parallax_seed1"], runs["no_decay/parallax_seed1"]
    assert (loss_before_decay(run), held_out_loss(run)) == (3.4, 2.98)
    assert (average_loss_before_decay(run), average_held_out_loss(run)) == (3.54, 3.04)
    assert (loss_before_decay(branch), held_out_loss(branch)) == (3.4, 2.98 + 0.4)
    assert average_held_out_loss(branch) == pytest.approx(3.24)
    assert own_tokens(branch) == (STEPS - BEFORE) * STEP_TOKENS
    hours = own_device_hours(branch)
    assert hours == pytest.approx((STEPS - BEFORE) * 1.8 * 2 / 3600)
    # of a run that never decays, none is before
    constant = make_run(tmp_path / "c", [launch(), *training(3.0)], "--schedule.decay_ratio", "0")
    assert loss_before_decay(read_run(constant)) is None
    # of one that has stopped before its decay, the last loss is its final one
    words, records = ("--training.stop_at_step", str(BEFORE)), training(3.0, last=BEFORE)
    stopped = make_run(tmp_path / "s", [launch(), *records, held_out(BEFORE, 3.5)], *words)
    assert (loss_before_decay(read_run(stopped)), held_out_loss(read_run(stopped))) == (None, 3.5)


def test_gains_are_means_of_differences_at_equal_seeds(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "x")
    softmax, parallax = arms_of(plan, plan.stages[0], runs_of(tmp_path / "x", plan))
    assert (softmax.other, parallax.other) == (None, "softmax")
    assert softmax.gain(held_out_loss) is None
    before, end = parallax.gain(loss_before_decay), parallax.gain(held_out_loss)
    assert before is not None
    assert (before.mean, before.error, before.num_seeds) == (
        pytest.approx(-0.12),
        pytest.approx(0.02),
        2,
    )
    assert end is not None
    assert (end.mean, end.error) == (pytest.approx(-0.03), pytest.approx(0.01))
    change = parallax.change_of_gain(loss_before_decay, held_out_loss)
    assert change is not None
    assert (change.mean, change.error) == (pytest.approx(0.09), pytest.approx(0.01))


def test_the_report_has_gains_and_every_run(tmp_path: Path) -> None:
    make_plan(tmp_path / "x")
    text = write_plan_report(tmp_path / "x", out=tmp_path / "out").read_text()
    row = cells(text, "Stage seeds", "parallax")
    assert row["Before decay"] == "3.4300 ± 0.0300"
    assert row["Minus"] == "softmax"
    assert row["Difference before decay"] == "-0.1200 ± 0.0200"
    assert row["Difference at the end"] == "-0.0300 ± 0.0100"
    assert row["Change over the decay"] == "+0.0900 ± 0.0100"
    assert row["Difference of averages at the end"] == "-0.0800 ± 0.0200"
    # one seed has no standard error
    assert cells(text, "Stage no_decay", "parallax")["Difference of averages at the end"] == "-0.0600"
    assert len(rows_of(text, "Runs")) == 6
    assert cells(text, "Runs", "no_decay/parallax_seed1")["Steps"] == "23 to 30"
    assert "6 runs, 6 of them finished" in text
    with (tmp_path / "out/arms_of_seeds.csv").open() as file:
        found = list(csv.DictReader(file))
    assert float(found[1]["Difference at the end"]) == pytest.approx(-0.03)
    assert (tmp_path / "out/gains.pdf").exists()
    assert "![Gains of seeds over training](seeds/gains_over_training.png)" in text


def test_a_page_has_the_figures_of_its_stages_and_no_other_files(tmp_path: Path) -> None:
    make_plan(tmp_path / "x")
    out = tmp_path / "page"
    __main__.main([str(tmp_path / "x"), "--figures", "seeds", "--out", str(out)])
    text = (out / "report.md").read_text()
    shown = re.findall(r"\]\(([\w/]+\.png)\)", text)
    assert {"gains.png", "seeds/gains_over_training.png", "seeds/held_out.png"} <= {*shown}
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == {*shown}
    assert not list(out.rglob("*.pdf"))
    assert not (out / "no_decay").exists()
    assert "Each plot is also a PDF" not in text
    with pytest.raises(UserError, match="--figures rates: the plan has the stages seeds, no_decay"):
        __main__.main([str(tmp_path / "x"), "--figures", "rates", "--out", str(out)])
    with pytest.raises(UserError, match="give the folder of a plan"):
        __main__.main([str(tmp_path / "x/seeds"), "--figures", "seeds", "--out", str(out)])


def test_what_is_drawn_of_gains_stands_in_the_plot(
    tmp_path: Path, figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan(tmp_path / "x")
    write_plan_report(tmp_path / "x", out=tmp_path / "out", figures=["seeds"])
    (axes,) = figures["gains.png"].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["parallax"] * 2
    assert [text.get_text() for text in axes.texts] == ["seeds", "no_decay"]
    ends = next(each for each in axes.containers if each.get_label() == "After the last step")
    assert isinstance(ends, ErrorbarContainer)
    assert list(np.asarray(ends.lines[0].get_xdata())) == [pytest.approx(-0.03), pytest.approx(-0.02)]
    low, high = axes.get_ylim()
    assert low > max(axes.get_yticks())
    assert high < min(axes.get_yticks())
    # rendered, it is a small file of few colors
    monkeypatch.undo()
    plan = read_plan(tmp_path / "x")
    runs = runs_of(tmp_path / "x", plan)
    assert plot_gains(arms_of(plan, plan.stages[0], runs), tmp_path / "gains.png")
    with Image.open(tmp_path / "gains.png") as image:
        assert image.mode == "P"
    assert (tmp_path / "gains.png").stat().st_size < 50_000


def test_a_stage_of_rows_of_other_lengths_does_not_end_the_report(tmp_path: Path) -> None:
    make_plan(tmp_path / "x")
    config = tmp_path / "x/no_decay/softmax_seed1/config.toml"
    config.write_text(config.read_text().replace("seq_len = 32", "seq_len = 16"))
    text = write_plan_report(tmp_path / "x", out=tmp_path / "out").read_text()
    assert "comparable in pairs alone; they differ: training.seq_len is 16" in text
    assert "give --allow-different" in text
    assert (tmp_path / "out/seeds/report.md").exists()
    assert not (tmp_path / "out/no_decay/report.md").exists()
    assert cells(text, "Stage no_decay", "parallax")["Minus"] == "softmax"
    text = write_plan_report(tmp_path / "x", out=tmp_path / "page", figures=["no_decay"]).read_text()
    assert "comparable in pairs alone" in text
    assert "no_decay/held_out.png" in text
    write_plan_report(tmp_path / "x", out=tmp_path / "out", allow_different=True)
    assert (tmp_path / "out/no_decay/report.md").exists()


def test_arms_of_one_model_differ_in_color(tmp_path: Path, figures: dict[str, Figure]) -> None:
    plan = make_plan(tmp_path / "x")
    _, parallax = arms_of(plan, plan.stages[0], runs_of(tmp_path / "x", plan))
    assert plot_gains_over_training([parallax, replace(parallax, name="other")], tmp_path / "x.png")
    (axes,) = figures["x.png"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["parallax (2 pairs)"].get_color() == COLORS[1]
    assert lines["other (2 pairs)"].get_color() != COLORS[1]
    points = [each for each in axes.containers if isinstance(each, ErrorbarContainer)]
    assert len(points) == 2
    # softmax has nothing to be compared with
    assert not plot_gains_over_training([replace(parallax, other=None, others={})], tmp_path / "y.png")


def test_gains_are_drawn_against_the_axis_of_their_stage(tmp_path: Path, figures: dict[str, Figure]) -> None:
    plan = make_plan(tmp_path / "x")
    _, arm = arms_of(plan, plan.stages[0], runs_of(tmp_path / "x", plan))
    one_seed = replace(arm, runs={1: arm.runs[1]})  # a difference of -0.02, over both it is -0.03
    arms = [
        replace(each, config=config, values={"length": [value, 64 * 1024 // value], "kind": config})
        for config, each, value in (
            ("muon", arm, 8192),
            ("muon", one_seed, 1024),
            ("adamw", arm, 1024),
            ("adamw", arm, 4096),
            ("soap", arm, 1024),
        )
    ]
    assert plot_gains_by_value(arms, tmp_path / "x.png")
    (axes,) = figures["x.png"].axes
    assert axes.get_xlabel() == "length"
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1024", "4096", "8192"]
    drawn = [each for each in axes.containers if isinstance(each, ErrorbarContainer)]
    # one value makes no line
    assert [each.get_label() for each in drawn] == ["muon", "adamw"]
    assert list(np.asarray(drawn[0].lines[0].get_xdata())) == [1024, 8192]
    assert list(np.asarray(drawn[0].lines[0].get_ydata())) == [pytest.approx(-0.02), pytest.approx(-0.03)]
    # an axis of words, a single value, and a stage with two axes have no plot
    for values in ({"kind": "a"}, {"length": 1}, {}):
        assert not plot_gains_by_value([replace(arm, values=values)] * 2, tmp_path / "y.png")
    two = [replace(arm, values={"length": x, "gain": x}) for x in (1, 2)]
    assert not plot_gains_by_value(two, tmp_path / "y.png")


def test_a_stage_says_that_its_runs_or_those_they_are_compared_with_are_of_several_devices(
    tmp_path: Path,
) -> None:
    make_plan(tmp_path / "x")
    metrics = tmp_path / "x/no_decay/softmax_seed1/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("NVIDIA H100", "NVIDIA B200"))
    text = write_plan_report(tmp_path / "x", out=tmp_path / "out").read_text()
    seeds, no_decay = text.split("## Stage ")[1:]
    assert "The runs are of several" not in seeds
    # the branch's first steps are those of its trunk, on the other device
    assert (
        "several devices, to which part of their differences may be due: NVIDIA H100, then NVIDIA B200"
        in no_decay
    )
