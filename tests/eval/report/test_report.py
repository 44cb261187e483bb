"""The report shows what runs recorded, with correct standard errors, and refuses incomparable runs."""

import csv
import math
import statistics
from pathlib import Path

import pytest

import config
from config import to_table
from errors import run_command
from eval.report.__main__ import main
from eval.report.paper_numbers import paper_row
from eval.report.run_records import find_runs, flatten, read_run
from tests.eval.report.run_folders import (
    CONFIGS,
    STEP_TOKENS,
    STEPS,
    cells,
    held_out,
    launch,
    make_run,
    report,
    rows_of,
    seeds,
    step_record,
    training,
)
from tests.project_configs import project_configs
from training.run_config import RunConfig

TRAINING, HELD_OUT = "Training loss (nats/token)", "Held-out loss (nats/token)"


def test_means_and_standard_errors_over_seeds_equal_a_calculation_by_hand(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "softmax", (2.50, 2.54)), *seeds(tmp_path, "parallax", (2.40, 2.41))]
    text = report(folders, tmp_path, baseline="softmax_muon_1")
    # s / sqrt(2) = |a - b| / 2; the last 20 steps lie 0.95 above the last one
    softmax, parallax = (cells(text, "Results", f"{name}, Muon") for name in ("Softmax", "Parallax"))
    assert [softmax[key] for key in ("Seeds", TRAINING, HELD_OUT)] == [
        "2",
        "3.9700 ± 0.0200",
        "2.5200 ± 0.0200",
    ]
    assert [parallax[key] for key in ("Seeds", TRAINING, HELD_OUT)] == [
        "2",
        "**3.8550 ± 0.0050**",
        "**2.4050 ± 0.0050**",
    ]
    # recorded by neither run
    assert not any("perplexity" in heading or "over documents" in heading for heading in softmax)
    # of the same seeds: -0.10 and -0.13
    assert cells(text, "Difference to Softmax, Muon", "Parallax, Muon") == {
        "Row": "Parallax, Muon",
        "Seeds of row / baseline": "2 / 2",
        TRAINING: "-0.1150 ± 0.0150 (2 pairs)",
        HELD_OUT: "-0.1150 ± 0.0150 (2 pairs)",
    }
    assert cells(text, "What differs", "Parallax, Muon") == {
        "Row": "Parallax, Muon",
        "`model.attention.kind`": "parallax",
    }


def test_a_difference_of_other_seeds_has_the_error_of_independent_means(tmp_path: Path) -> None:
    folders = seeds(tmp_path, "softmax", (2.50, 2.54, 2.51))
    for seed, loss in ((7, 2.40), (8, 2.41)):
        words = ("--run.seed", str(seed), "--data.shuffle_seed", str(seed))
        folders.append(
            make_run(tmp_path / str(seed), [launch(), *training(2.0), held_out(STEPS, loss)], *words)
        )
    text = report(folders, tmp_path, baseline="softmax_muon_0")
    variances = statistics.variance([2.50, 2.54, 2.51]) / 3, statistics.variance([2.40, 2.41]) / 2
    row = cells(text, "Difference to Softmax, Muon", "Parallax, Muon")
    assert row["Seeds of row / baseline"] == "2 / 3"
    assert (
        row[HELD_OUT] == f"{2.405 - 7.55 / 3:.4f} ± {math.sqrt(sum(variances)):.4f} (unpaired, 2 and 3 seeds)"
    )


def test_one_seed_has_no_standard_error(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "softmax", (2.50, 2.54)), *seeds(tmp_path, "parallax", (2.40,))]
    text = report(folders, tmp_path, baseline="softmax_muon_0")
    assert [*cells(text, "Difference to Softmax, Muon", "Parallax, Muon").values()][1:] == [
        # at the seed that both have
        *("1 / 2", "-0.1000 (1 pair)", "-0.1000 (1 pair)")
    ]
    assert "A single run has no standard error" in text


def test_arms_are_compared_at_their_best_learning_rates(tmp_path: Path) -> None:
    rate = "--optimizer.groups.hidden.lr"
    folders = [
        *seeds(tmp_path, "softmax", (2.50, 2.52)),
        *(
            seeds(tmp_path, "softmax", (loss,), rate, lr)[0]
            for lr, loss in (("0.005", 2.60), ("0.02", 2.51 + 0.2))
        ),
        *seeds(tmp_path, "parallax", (2.42, 2.40), rate, "0.02"),
        *seeds(tmp_path, "parallax", (2.45,)),
        *seeds(tmp_path, "parallax", (2.9,), rate, "0.002", optimizer="adamw"),
        # stopped at a loss of NaN
        make_run(tmp_path / "x", [launch(), *training(2.0, last=3)], rate, "0.4"),
    ]
    # any row of the baseline's arm stands for it
    text = report(folders, tmp_path, baseline="softmax_muon_0.005_0")
    base = "Minus Softmax, Muon, lr 0.01"
    assert cells(text, "Best learning rates", "Softmax, Muon") == {
        "Arm": "Softmax, Muon",
        "Learning rates": "0.005, 0.01, 0.02",
        "Best": "0.01",
        "Seeds": "2",
        HELD_OUT: "2.5100 ± 0.0100",
        base: "-",
    }
    parallax = cells(text, "Best learning rates", "Parallax, Muon")
    assert parallax["Learning rates"] == "0.01, 0.02, 0.4 (no loss)"
    assert parallax[HELD_OUT] == "**2.4100 ± 0.0100**"
    assert parallax[base] == "-0.1000 ± 0.0200 (2 pairs)"
    assert "Parallax, AdamW,0.002,0.002,the only one tried" in (
        (tmp_path / "out" / "best_learning_rates.csv").read_text().replace('"', "")
    )
    assert cells(text, "Best learning rates", "Parallax, AdamW")["Best"] == "0.002 (the only one tried)"
    text = report(folders[:3], tmp_path)
    assert cells(text, "Best learning rates", "Softmax, Muon")["Best"] == "0.01 (the largest tried)"
    text = report([*folders[:2], folders[3]], tmp_path)
    assert cells(text, "Best learning rates", "Softmax, Muon")["Best"] == "0.01 (the smallest tried)"
    assert "Best learning rates" not in report(folders[:2], tmp_path)


def test_an_arm_without_the_group_whose_rate_is_swept_has_no_rate(tmp_path: Path) -> None:
    rate = "--optimizer.groups.hidden.lr"
    folders = [
        seeds(tmp_path, "softmax", (loss,), rate, lr)[0] for lr, loss in (("0.01", 2.5), ("0.02", 2.6))
    ]
    other = make_run(tmp_path / "other", [launch(), *training(2.0), held_out(STEPS, 2.7)])
    path = other / "config.toml"
    path.write_text(path.read_text().replace("optimizer.groups.hidden", "optimizer.groups.matrices"))
    row = cells(report([*folders, other], tmp_path), "Best learning rates", "Parallax")
    assert (row["Learning rates"], row["Best"], row[HELD_OUT]) == ("-", "-", "2.7000")


def test_a_second_run_of_the_same_seeds_is_a_row_of_its_own(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / name, [launch(), *training(2.0)]) for name in "ab")
    text = report([first, second], tmp_path)
    assert rows_of(text, "Results") == ["Parallax, Muon (a)", "Parallax, Muon (b)"]
    assert cells(text, "Results", "Parallax, Muon (a)")["Seeds"] == "1"
    assert "Nothing that changes training but seeds." in text


def test_rows_are_sorted_by_loss_behind_the_baseline_and_the_best_is_bold(tmp_path: Path) -> None:
    folders = [
        *seeds(tmp_path, "softmax", (2.6,)),
        *seeds(tmp_path, "softmax", (2.7,), optimizer="adamw"),
        *seeds(tmp_path, "parallax", (2.4,), optimizer="adamw"),
        *seeds(tmp_path, "parallax", (2.5,)),
    ]
    order = ["Parallax, AdamW", "Parallax, Muon", "Softmax, Muon", "Softmax, AdamW"]
    assert rows_of(report(folders, tmp_path), "Results") == order
    text = report(folders, tmp_path, baseline="softmax_muon_0")
    order.insert(0, order.pop(2))
    for heading in ("Runs", "What differs", "Results", "Throughput and cost"):
        assert rows_of(text, heading) == order
    bold = [name for name in order if "**" in cells(text, "Results", name)[HELD_OUT]]
    assert bold == ["Parallax, AdamW"]
    assert "**" not in report(folders[:1], tmp_path)


def test_a_table_is_also_csv_with_numbers_in_full(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "softmax", (2.50, 2.54)), *seeds(tmp_path, "parallax", (2.40,))]
    text = report(folders, tmp_path, baseline="softmax_muon_0")
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        lines = {line["Row"]: line for line in csv.DictReader(file)}
    assert float(lines["Softmax, Muon"][HELD_OUT]) == pytest.approx(2.52, abs=1e-12)
    assert float(lines["Softmax, Muon"][f"{HELD_OUT}, s.e."]) == pytest.approx(0.02, abs=1e-12)
    assert lines["Parallax, Muon"][f"{HELD_OUT}, s.e."] == ""
    assert lines["Softmax, Muon"]["Held-out tokens"] == "500"
    for name in ("runs", "what_differs", "results", "differences", "cost"):
        path = tmp_path / "out" / f"{name}.csv"
        with path.open(newline="") as file:
            assert len({len(line) for line in csv.reader(file)}) == 1
    assert text.count("\n| ---") == len([*(tmp_path / "out").glob("*.csv")])
    # of the report before
    report(folders[:1], tmp_path)
    assert not (tmp_path / "out" / "differences.csv").exists()
    assert not (tmp_path / "out" / "differences.png").exists()


def test_the_tokens_and_documents_behind_a_held_out_loss_stand_beside_it(tmp_path: Path) -> None:
    counts = {"validation_tokens": 99_859, "validation_documents": 141, "validation_stderr": 0.3}
    folder = make_run(tmp_path / "a", [launch(), *training(2.0), {**held_out(STEPS, 2.0), **counts}])
    row = cells(report([folder], tmp_path), "Results", "Parallax, Muon")
    assert "Documents cut into rows" not in row
    counts["validation_cut_documents"] = 0
    folder = make_run(tmp_path / "b", [launch(), *training(2.0), {**held_out(STEPS, 2.0), **counts}])
    row = cells(report([folder], tmp_path), "Results", "Parallax, Muon")
    assert row["Documents cut into rows"] == "0"
    assert row["Held-out tokens"] == "99,859"
    assert row["Held-out documents"] == "141"
    assert row["S.e. over documents (nats/token)"] == "0.3000"


def test_a_folder_of_runs_is_all_runs_in_it(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "softmax", (2.5, 2.6)), *seeds(tmp_path, "parallax", (2.4,))]
    (tmp_path / "plan").mkdir()
    deeper = make_run(tmp_path / "plan" / "x", [launch(), *training(2.0)], "--training.max_grad_norm", "2")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".kept").mkdir()
    make_run(tmp_path / ".kept" / "old", [launch(), *training(2.0)])
    # what is in a run folder is the run's
    (folders[0] / "tasks").mkdir()
    (folders[0] / "tasks" / "config.toml").write_text("")
    assert find_runs([tmp_path]) == sorted([*folders, deeper])
    assert find_runs([folders[1], tmp_path])[0] == folders[1]
    assert len(find_runs([folders[1], tmp_path])) == 4
    text = report([tmp_path], tmp_path / "there")
    assert rows_of(text, "Results")[0] == "Parallax, Muon, max_grad_norm 1"


def test_nothing_to_report_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    empty = tmp_path / "runs"
    empty.mkdir()
    for expected in ("nothing to report in", "1 started, none finished a step"):
        assert run_command(lambda: main([str(empty), "--out", str(out)])) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error
        assert str(empty) in error
        assert "\n" not in error
        assert not out.exists()
        if not (empty / "a").exists():
            make_run(empty / "a", [launch()])


def test_a_damaged_last_line_is_skipped_and_noted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [launch(), *training(2.0), held_out(STEPS, 2.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    text = report([folder], tmp_path)
    assert 'the last line is damaged and was skipped: \'{"step": 31, "lo\'' in text
    assert cells(text, "Results", "Parallax, Muon")[HELD_OUT] == "2.0000"


def test_empty_and_unfinished_runs_are_noted(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", [launch(), *training(2.0), held_out(STEPS, 2.0)])
    half = [launch(), *training(2.0, last=12), held_out(12, 3.0)]
    half_folder = make_run(tmp_path / "half", half, "--run.seed", "1", "--model.attention.gate", "head")
    empty = make_run(tmp_path / "empty", [])
    text = report([whole, half_folder, empty], tmp_path, baseline="whole")
    assert f"{half_folder} is not finished: step 12 of {STEPS}" in text
    assert f"{empty} has no training steps" in text
    half_row = cells(text, "Results", "Parallax gate head, Muon")
    assert [half_row[TRAINING], half_row[HELD_OUT]] == ["-", "-"]
    # no row but the baseline has a loss: no column is left to subtract in
    assert [*cells(text, "Difference to Parallax, Muon", "Parallax gate head, Muon")] == [
        *("Row", "Seeds of row / baseline")
    ]
    with pytest.raises(ValueError, match="there is no folder"):
        report([tmp_path / "missing"], tmp_path)
    with pytest.raises(ValueError, match=r"is not a row; rows, and their runs: Parallax, Muon \(whole\)"):
        report([whole], tmp_path, baseline="other")


def test_a_resumed_run_counts_each_step_once_with_the_ranks_of_its_launch(tmp_path: Path) -> None:
    records = [
        *[launch(num_ranks=2), held_out(0, 8.0), *training(2.0, last=20), held_out(15, 9.9)],
        # killed after step 20, resumed from the checkpoint of step 10 on four ranks
        *[launch(10, num_ranks=4), *training(2.0, first=11), held_out(STEPS, 1.9)],
    ]
    folder = make_run(tmp_path / "a", records)
    run = read_run(folder)
    assert [record["step"] for record in run.steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in run.held_out] == [0, STEPS]
    text = report([folder], tmp_path)
    hours = [f"{x:.3f}" for x in (30 * 1.8 / 3600, *2 * [(10 * 2 + 20 * 4) * 1.8 / 3600])]
    expected = ["2 x NVIDIA H100, 4 x NVIDIA H100", "1,016", "40.0", "40.0", *hours]
    assert [*cells(text, "Throughput and cost", "Parallax, Muon").values()][1:] == expected
    assert [*cells(text, "Runs", "Parallax, Muon").values()][3:7] == [
        "2.50",
        "30 of 30",
        "7,680",
        f"{30 * STEP_TOKENS * 100.0:.3e}",
    ]


def test_the_token_budget_of_a_run_is_what_it_recorded(tmp_path: Path) -> None:
    # trained with twice the batch size that the config has since its resume
    resumed = [{**step_record(s, 2.0), "tokens": 2 * s * STEP_TOKENS} for s in range(1, 21)]
    assert read_run(make_run(tmp_path / "a", [launch(), *resumed])).budget == (40 + 10) * STEP_TOKENS
    assert read_run(make_run(tmp_path / "b", [])).budget == STEPS * STEP_TOKENS
    words = ("--training.stop_at_step", "15")
    assert read_run(make_run(tmp_path / "c", resumed, *words)).budget == 30 * STEP_TOKENS


def test_a_branch_includes_curves_and_cost_of_its_trunk(tmp_path: Path) -> None:
    stable = [launch(num_ranks=1), held_out(0, 8.0), *training(2.0), held_out(STEPS, 2.5)]
    make_run(tmp_path / "stable", stable, "--schedule.decay_ratio", "0")
    start = ("--checkpoint.start_from", "runs/stable/checkpoint/step-20")
    records = [launch(20, num_ranks=3), *training(1.0, first=21), held_out(STEPS, 1.5)]
    branch = make_run(tmp_path / "branch", records, *start)
    run = read_run(branch)
    assert [record["step"] for record in run.steps] == list(range(1, STEPS + 1))
    assert [(r["step"], r["tokens"]) for r in run.held_out] == [(0, 0), (STEPS, STEPS * STEP_TOKENS)]
    assert run.num_trunk_steps == 20
    assert run.notes == []
    assert run.steps[-1]["rank_seconds"] == pytest.approx((20 * 1 + 10 * 3) * 1.8)
    text = report([branch], tmp_path)
    # medians are over the branch's own steps
    cost = cells(text, "Throughput and cost", "Parallax, Muon")
    assert [cost["Ranks"], cost["Tokens/s"]] == ["3 x NVIDIA H100", "1,026"]
    lonely = tmp_path / "elsewhere"
    lonely.mkdir()
    run = read_run(make_run(lonely / "branch", records, *start))
    assert [record["step"] for record in run.steps] == list(range(21, STEPS + 1))
    assert "its curves begin at step 21, its FLOPs and hours are not known" in run.notes[0]


def test_a_run_without_a_launch_record_has_no_flops_and_no_cost(tmp_path: Path) -> None:
    text = report([make_run(tmp_path / "a", training(2.0))], tmp_path)
    assert not {"Parameters (M)", "FLOPs"} & cells(text, "Runs", "Parallax, Muon").keys()
    assert not any("Device" in heading for heading in cells(text, "Throughput and cost", "Parallax, Muon"))
    assert "loss_flops.png" not in text
    assert not (tmp_path / "out" / "loss_flops.png").exists()


def test_a_value_of_fewer_seeds_than_the_row_is_marked(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path, "softmax", (2.50, 2.54)), *seeds(tmp_path, "parallax", (2.40, 2.41))]
    records = [launch(), *training(3.0)]
    words = ("--run.seed", "7", "--data.shuffle_seed", "7")
    folders.append(make_run(tmp_path / "third", records, *words, name="debug_parallax_muon"))
    text = report(folders, tmp_path, baseline="softmax_muon_0")
    assert cells(text, "Results", "Parallax, Muon")[HELD_OUT] == "**2.4050 ± 0.0050 (2 of 3)**"
    assert "of 3)" not in cells(text, "Results", "Parallax, Muon")[TRAINING]
    difference = cells(text, "Difference to Softmax, Muon", "Parallax, Muon")
    assert difference[HELD_OUT].endswith(" (2 pairs)")
    assert f'"{HELD_OUT}, note"' in (tmp_path / "out" / "results.csv").read_text()
    assert "over the last 20 steps" in text


def test_the_final_training_loss_of_a_short_run_is_over_all_its_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [launch(), *training(2.0, last=5)], "--training.steps", "5")
    assert "The training loss is averaged over the last 5 steps" in report([folder], tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ["row_beta2", "0.95"],
        ["schedule.decay_shape", "cosine"],
        ["fixed_norm", "true", "--optimizer.groups.hidden.weight_decay", "0"],
        ["kind", "soap", "--optimizer.groups.hidden.lr", "0.01"],
        ["kind", "orthogonalized-adamw", "--optimizer.groups.hidden.lr", "0.01"],
    ],
)
def test_updates_that_the_paper_has_not_have_no_row(change: list[str]) -> None:
    words = [f"--optimizer.groups.hidden.{change[0]}", *change[1:]]
    for overrides, has_row in (([], True), (words, False)):
        run = config.load(RunConfig, CONFIGS / "0.6b_parallax_muon.toml", overrides)
        assert (paper_row(flatten(to_table(run))) is not None) == has_row


def test_every_config_of_the_paper_has_its_row_and_no_other_config_has_one() -> None:
    found = {}
    for path in project_configs():
        row = paper_row(flatten(to_table(config.load(RunConfig, path))))
        if row is not None:
            found[path.stem] = (row.lambada_perplexity, row.mean_accuracy)
    matched = {
        "0.6b_softmax_muon": (22.15, 54.54),
        "0.6b_softmax_parameter_matched_muon": (22.35, 54.90),
        "0.6b_parallax_compute_matched_muon": (20.29, 55.79),
        "0.6b_parallax_compute_parameter_matched_muon": (20.29, 55.79),
        "0.6b_parallax_no_rope_on_r_muon": (19.77, 55.54),
        "0.6b_parallax_muon": (18.56, 55.99),
        "0.6b_parallax_adamw": (None, 52.68),
        "0.6b_softmax_adamw": (None, 52.61),
        "0.6b_kda_muon": (25.16, 52.73),
        "0.6b_gated-deltanet_muon": (24.63, 53.67),
        "1.7b_softmax_muon": (13.07, 61.43),
        "1.7b_parallax_muon": (10.80, 62.45),
    }
    assert found == matched
