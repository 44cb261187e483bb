"""The report of a plan: baseline at its best, choices, and what is missing."""

import json
from pathlib import Path

import pytest

from errors import UserError
from eval.report import __main__
from eval.report.plan_file import Choice, PlanFile, PlannedRun, PlannedStage, is_plan, read_plan
from eval.report.plan_report import write_plan_report
from tests.eval.report.run_folders import (
    STEPS,
    cells,
    diagnostics_record,
    held_out,
    launch,
    make_run,
    rows_of,
    training,
)

RATE = "--optimizer.groups.hidden.lr"
LOSSES = {("softmax", 0.01): 3.0, ("softmax", 0.02): 3.2, ("parallax", 0.01): 2.9, ("parallax", 0.02): 2.8}


def make_plan(
    folder: Path,
    *,
    missing: tuple[str, ...] = (),
    unfinished: tuple[str, ...] = (),
    averaged: tuple[str, ...] = (),
) -> PlanFile:
    """Write a plan of two attentions, two rates and two seeds, and a stage that waits for it."""
    members = []
    (folder / "rates").mkdir(parents=True)
    for kind, rate in LOSSES:
        for seed in (0, 1):
            run = f"rates/{kind}_lr{rate}_seed{seed}"
            planned = PlannedRun(
                number=len(members), config="x", run=run, arm=kind, values={"lr": rate}, seed=seed
            )
            members.append(planned)
            if run in missing:
                continue
            loss = LOSSES[kind, rate] + 0.01 * seed
            last = 12 if run in unfinished else STEPS
            records = [launch(), held_out(0, 8.0), *training(loss, last=last)]
            average = {"average_validation_loss": loss - 0.3} if run in averaged else {}
            records += [{**held_out(STEPS, loss), **average}] if last == STEPS else []
            words = (RATE, str(rate), "--run.seed", str(seed), "--data.shuffle_seed", str(seed))
            make_run(folder / run, records, *words, name=f"debug_{kind}_muon")
    choices = [
        Choice(arm="softmax", values={"lr": 0.01}, loss=3.005, warning="the best lr is the smallest tried"),
        Choice(arm="parallax", values={"lr": 0.02}, loss=2.805),
    ]
    later = PlannedRun(number=len(members), config="x", arm="softmax", seed=5)
    stages = [
        PlannedStage(name="rates", members=members, choices=choices),
        PlannedStage(name="seeds", members=[later]),
    ]
    plan = PlanFile(baseline="softmax", stages=stages)
    plan.write(folder)
    return plan


def test_a_plan_file_reads_as_it_was_written(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "x")
    assert is_plan(tmp_path / "x")
    assert not is_plan(tmp_path / "x/rates")
    assert read_plan(tmp_path / "x") == plan


def test_the_baseline_is_its_arm_at_its_best(tmp_path: Path) -> None:
    make_plan(tmp_path / "x")
    text = write_plan_report(tmp_path / "x", out=tmp_path / "out").read_text()
    assert cells(text, "Stage rates", "softmax")["Warning"] == "the best lr is the smallest tried"
    assert cells(text, "Stage rates", "parallax")["Best lr"] == "0.02"
    assert "* 8: seeds, softmax, seed 5: what it takes from another stage is not chosen" in text
    assert text.count("\n* ") == 1
    stage = (tmp_path / "out/rates/report.md").read_text()
    assert "## Difference to Softmax, Muon, lr 0.01" in stage
    difference = cells(stage, "Difference to Softmax, Muon, lr 0.01", "Parallax, Muon, lr 0.02")
    assert difference["Held-out loss (nats/token)"] == "-0.2000 ± 0.0000 (2 pairs)"
    assert len(rows_of(stage, "Results")) == 4


def test_the_loss_of_the_averaged_weights_stands_beside_the_plain_one(tmp_path: Path) -> None:
    average = "Held-out loss of the average (nats/token)"
    runs = tuple(f"rates/parallax_lr0.02_seed{seed}" for seed in (0, 1))
    make_plan(tmp_path / "x", averaged=runs)
    text = write_plan_report(tmp_path / "x", out=tmp_path / "out").read_text()
    assert cells(text, "Stage rates", "parallax")[average] == "2.5050"
    assert cells(text, "Stage rates", "softmax")[average] == "-"
    stage = (tmp_path / "out/rates/report.md").read_text()
    assert cells(stage, "Results", "Parallax, Muon, lr 0.02")[average].startswith("2.5050 ± ")
    make_plan(tmp_path / "y")
    assert average not in write_plan_report(tmp_path / "y", out=tmp_path / "out").read_text()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    absent, cut = "rates/softmax_lr0.01_seed1", "rates/parallax_lr0.02_seed0"
    make_plan(tmp_path / "x", missing=(absent,), unfinished=(cut,))
    text = write_plan_report(tmp_path / "x", out=tmp_path / "out").read_text()
    assert f"* 1: {absent}: no training steps" in text
    assert f"* 6: {cut}: step 12 of {STEPS}" in text
    assert "| rates | 2 | 8 | 6 |" in text


def test_a_plan_is_reported_alone(tmp_path: Path) -> None:
    make_plan(tmp_path / "x")
    for words in ([str(tmp_path / "x"), "--baseline", "softmax"], [str(tmp_path / "x"), str(tmp_path)]):
        with pytest.raises(UserError, match="alone"):
            __main__.main([*words, "--out", str(tmp_path / "out")])
    __main__.main([str(tmp_path / "x"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/rates/results.csv").exists()


def test_a_plan_without_steps_has_no_report(tmp_path: Path) -> None:
    later = PlannedRun(number=0, config="x", arm="softmax", seed=5)
    PlanFile(stages=[PlannedStage(name="seeds", members=[later])]).write(tmp_path / "x")
    with pytest.raises(UserError, match="no member of the plan has a training step"):
        write_plan_report(tmp_path / "x", out=tmp_path / "out")


def test_diagnostics_of_the_arms_stand_in_a_table(tmp_path: Path) -> None:
    make_plan(tmp_path / "x")
    file = tmp_path / "x/rates/softmax_lr0.01_seed0/diagnostics.jsonl"
    file.write_text(json.dumps(diagnostics_record(STEPS, None, 2.0)) + "\n")
    text = write_plan_report(tmp_path / "x", out=tmp_path / "out").read_text()
    table = f"| softmax, lr 0.01 | 2 | 2.5 (1 of 2) | {40 + STEPS} (1 of 2) |"
    assert table in text
    assert (tmp_path / "out/diagnostics_of_rates.csv").is_file()
    file.unlink()
    assert table not in write_plan_report(tmp_path / "x", out=tmp_path / "out").read_text()
    assert not (tmp_path / "out/diagnostics_of_rates.csv").exists()
