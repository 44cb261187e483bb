"""What is not on record is named, and no number passes as complete without it."""

import shutil
from pathlib import Path

import pytest

from eval.report.plan_file import PlanFile, PlannedRun, PlannedStage
from eval.report.plan_report import write_plan_report
from eval.report.run_records import find_runs, read_run
from eval.report.run_values import loss_before_decay, own_device_hours, own_tokens
from eval.report.step_ranges import format_ranges, missing_ranges
from tests.eval.report.run_folders import (
    STEP_TOKENS,
    STEPS,
    cells,
    held_out,
    launch,
    make_run,
    report,
    training,
    write_results,
)

COST = "Throughput and cost"


def branch_of(plan: Path, *, with_trunk: bool) -> Path:
    """Write a branch whose folder has the name of its trunk's, in another stage."""
    for stage in ("stable", "decay"):
        (plan / stage).mkdir(parents=True)
    start = plan / "stable" / "x" / "checkpoint" / "step-20"
    make_run(plan / "stable" / "x", [launch(), *training(2.5, last=20), held_out(20, 3.0)])
    if not with_trunk:
        shutil.rmtree(plan / "stable" / "x")
    records = [launch(20), *training(2.5, first=21), held_out(STEPS, 2.0)]
    return make_run(plan / "decay" / "x", records, "--checkpoint.start_from", str(start))


def test_a_branch_is_not_its_own_trunk(tmp_path: Path) -> None:
    whole = read_run(branch_of(tmp_path / "whole", with_trunk=True))
    lonely = read_run(branch_of(tmp_path / "lonely", with_trunk=False))
    assert whole.notes == []
    (note,) = lonely.notes
    assert "step-20, whose run is missing: its curves begin at step 21" in note
    assert (len(whole.steps), len(lonely.steps)) == (30, 10)
    for run in (whole, lonely):
        assert run.num_trunk_steps == 20
        assert own_tokens(run) == 10 * STEP_TOKENS
        assert own_device_hours(run) == pytest.approx(10 * 2 * 1.8 / 3600)
    assert (loss_before_decay(whole), loss_before_decay(lonely)) == (3.0, None)
    # of the whole model they are not known
    last = lonely.steps[-1]
    assert (last["tokens"], last["flops"], last["seconds"], last["rank_seconds"]) == (
        *(STEPS * STEP_TOKENS, None),
        *(None, None),
    )
    text = report([lonely.folder], tmp_path)
    assert "FLOPs" not in cells(text, "Runs", "Parallax, Muon")
    assert not any("ours" in heading for heading in cells(text, COST, "Parallax, Muon"))
    assert cells(text, COST, "Parallax, Muon")["Tokens/s"] == "1,026"


def test_a_trunk_without_records_is_missing_too(tmp_path: Path) -> None:
    branch = branch_of(tmp_path / "p", with_trunk=True)
    (tmp_path / "p" / "stable" / "x" / "metrics.jsonl").write_text("")
    run = read_run(branch)
    assert ["whose run is missing" in note for note in run.notes] == [True]
    assert (run.num_trunk_steps, run.steps[-1]["seconds"]) == (20, None)


def test_a_branch_without_its_trunk_has_its_own_steps_in_the_plan(tmp_path: Path) -> None:
    branch_of(tmp_path / "p", with_trunk=False)
    stages = [
        PlannedStage(
            name=name, members=[PlannedRun(number=number, config="x", run=f"{name}/x", arm="x", seed=1)]
        )
        for number, name in enumerate(("stable", "decay"))
    ]
    PlanFile(stages=stages).write(tmp_path / "p")
    text = write_plan_report(tmp_path / "p", out=tmp_path / "out").read_text()
    row = cells(text, "Runs", "decay/x")
    assert (row["Steps"], row["Tokens (M)"], row["GPU-hours"]) == ("21 to 30", "0.00", "0.010")


def test_missing_steps_are_named_and_leave_no_hours(tmp_path: Path) -> None:
    kept = [record for record in training(2.0) if not 5 < record["step"] < 20]
    folder = make_run(tmp_path / "a", [launch(), *kept, held_out(STEPS, 2.0)])
    other = make_run(tmp_path / "b", [launch(), *training(2.0), held_out(STEPS, 2.0)], "--run.seed", "1")
    text = report([folder, other], tmp_path)
    assert f"{folder} has no record of steps 6 to 19: its curves have a gap, its hours are not known" in text
    row = cells(text, COST, "Parallax, Muon")
    assert row["Hours per run"] == "0.015 (1 of 2)"
    assert row["Device-hours per run"] == "0.030 (1 of 2)"
    assert "Device-hours, all seeds" not in row
    # those of their tokens are known
    assert cells(text, "Runs", "Parallax, Muon")["FLOPs"] == f"{STEPS * STEP_TOKENS * 100.0:.3e}"
    late = make_run(tmp_path / "late", [launch(), *training(2.0, first=9)])
    assert f"{late} has no record of steps 1 to 8: " in "; ".join(read_run(late).notes)


def test_hours_of_a_plan_say_which_steps_they_are_without(tmp_path: Path) -> None:
    (tmp_path / "p" / "s").mkdir(parents=True)
    kept = [record for record in training(2.0) if not 5 < record["step"] < 20]
    make_run(tmp_path / "p" / "s" / "x", [launch(), *kept, held_out(STEPS, 2.0)])
    stage = PlannedStage(name="s", members=[PlannedRun(number=0, config="x", run="s/x", arm="x", seed=1)])
    PlanFile(stages=[stage]).write(tmp_path / "p")
    text = write_plan_report(tmp_path / "p", out=tmp_path / "out").read_text()
    assert cells(text, "Runs", "s/x")["GPU-hours"] == "0.016 (without 14 of its steps)"
    assert "0.02 GPU-hours of training steps, without 14 steps that are not on record" in text


def test_ranges_of_missing_steps() -> None:
    assert missing_ranges([], 1, 3) == [(1, 3)]
    assert missing_ranges([5, 1, 2, 9, 3], 2, 7) == [(4, 4), (6, 7)]
    assert missing_ranges([1, 2, 3], 1, 3) == []
    assert missing_ranges([2], 3, 2) == []
    assert format_ranges([(4, 4)]) == "step 4"
    assert format_ranges([(4, 4), (6, 7)]) == "steps 4 and 6 to 7"
    assert format_ranges([(n, n) for n in (1, 3, 5, 7)]) == "steps 1 and 3 and 5, and others"


def test_numbers_of_runs_of_unequal_length_are_of_finished_ones_or_all_listed(tmp_path: Path) -> None:
    folders = []
    for seed, last in enumerate((3, STEPS, STEPS)):
        steps = [{**record, "grad_norm": 9.0 if record["step"] == 25 else 1.0} for record in training(2.0)]
        evaluations = [held_out(STEPS, 2.0)] if last == STEPS else []
        words = ("--run.seed", str(seed), "--data.shuffle_seed", str(seed))
        folders.append(make_run(tmp_path / str(seed), [launch(), *steps[:last], *evaluations], *words))
    text = report(folders, tmp_path)
    row = cells(text, "Runs", "Parallax, Muon")
    assert row["Steps"] == "3 of 30; 30 of 30"
    assert row["Tokens"] == f"{3 * STEP_TOKENS:,}; {STEPS * STEP_TOKENS:,}"
    assert row["FLOPs"] == f"{300.0 * STEP_TOKENS:.3e}; {100.0 * STEPS * STEP_TOKENS:.3e}"
    assert row["Parameters (M)"] == "2.50"
    results = cells(text, "Results", "Parallax, Muon")
    assert results["Gradient peaks above 3 times the median"] == "1.0 ± 0.0 (2 of 3)"
    cost = cells(text, COST, "Parallax, Muon")
    assert cost["Hours per run"] == "0.015 ± 0.000 (2 of 3)"
    assert cost["Device-hours per run"] == "0.030 ± 0.000 (2 of 3)"
    assert cost["Peak memory (GiB)"] == "40.0 ± 0.0 (2 of 3)"
    assert cost["Device-hours, all seeds"] == f"{63 * 2 * 1.8 / 3600:.3f}"
    # of an unfinished run alone, what it has so far
    cost = cells(report(folders[:1], tmp_path), COST, "Parallax, Muon")
    assert cost["Peak memory (GiB)"] == "13.0"
    assert "Hours per run" not in cost


def test_an_arm_without_a_loss_has_no_best_rate(tmp_path: Path) -> None:
    rate = "--optimizer.groups.hidden.lr"
    folders = []
    for kind, lr, last in (("softmax", "0.01", 5), ("softmax", "0.02", 5), ("parallax", "0.01", STEPS)):
        records = [launch(), *training(2.0, last=last), *([held_out(STEPS, 2.0)] if last == STEPS else [])]
        folders.append(make_run(tmp_path / (kind + lr), records, rate, lr, name=f"debug_{kind}_muon"))
    row = cells(report(folders, tmp_path), "Best learning rates", "Softmax, Muon")
    assert (row["Learning rates"], row["Best"]) == ("0.01 (no loss), 0.02 (no loss)", "-")


def test_results_of_an_earlier_step_are_noted_and_make_no_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [launch(), *training(2.0), held_out(15, 2.0)])
    write_results(folder / "tasks" / "results.json", folder / "checkpoint" / "step-15", {"boolq": 0.5}, 100)
    text = report([folder], tmp_path)
    assert "## All tasks" not in text
    for kind in ("held-out losses", "results of tasks"):
        assert f"{folder} has no {kind} of its last step, 30; those of step 15 are left out" in text
    # an unfinished run has nothing else
    half = make_run(tmp_path / "b", [launch(), *training(2.0, last=20), held_out(15, 2.0)])
    assert read_run(half).notes == [f"{half} is not finished: step 20 of {STEPS}"]


def test_runs_of_other_budgets_do_not_differ_in_seeds_alone(tmp_path: Path) -> None:
    words = ("--training.stop_at_step", "15")
    short = make_run(tmp_path / "a", [launch(), *training(2.0, last=15), held_out(15, 2.0)], *words)
    whole = make_run(tmp_path / "b", [launch(tokenizer_fingerprint="e" * 16), *training(2.0)])
    text = report([short, whole], tmp_path, allow_different=True)
    assert cells(text, "What differs", "Parallax, Muon (a)") == {
        "Row": "Parallax, Muon (a)",
        "Tokenizer": "f" * 16,
        "Token budget": str(15 * STEP_TOKENS),
    }
    assert "Nothing that changes training" not in text


def test_a_run_under_two_paths_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "a", [launch(), *training(2.0)])
    monkeypatch.chdir(tmp_path)
    assert find_runs([Path("a"), folder, tmp_path]) == [Path("a")]


def test_a_line_without_a_number_of_its_step_is_damaged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [launch(), *training(2.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('5\n{"step": null, "loss": 1}\n{"step": "7", "loss": 1}\n')
    run = read_run(folder)
    assert len(run.steps) == STEPS
    assert sum("is damaged and was skipped" in note for note in run.notes) == 3


@pytest.mark.parametrize("value", [None, "3.1"])
@pytest.mark.parametrize("key", ["loss", "step_seconds", "tokens"])
def test_a_step_without_its_loss_time_or_tokens_is_damaged(
    tmp_path: Path, key: str, value: str | None
) -> None:
    records = training(2.0)
    folder = make_run(tmp_path / "a", [launch(), *records[:-1], {**records[-1], key: value}])
    run = read_run(folder)
    assert len(run.steps) == STEPS - 1
    assert sum("is damaged and was skipped" in note for note in run.notes) == 1


def test_a_step_of_its_loss_alone_is_damaged(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [launch(), *training(2.0), {"step": STEPS + 1, "loss": 3.0}]))
    assert len(run.steps) == STEPS
    assert sum("is damaged and was skipped" in note for note in run.notes) == 1


def test_a_held_out_loss_that_is_no_number_is_damaged(tmp_path: Path) -> None:
    last = {**held_out(STEPS, 2.0), "validation_loss": None}
    run = read_run(make_run(tmp_path / "a", [launch(), *training(2.0), last]))
    assert run.held_out == []
    assert sum("is damaged and was skipped" in note for note in run.notes) == 1
