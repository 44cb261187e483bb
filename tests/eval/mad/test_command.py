"""`python -m eval.mad`: results that resume, scores and their table."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from errors import UserError
from eval.mad import __main__ as command
from eval.mad import examples, plots
from eval.mad.plots import difficulties, plot_difficulty, plot_scores
from eval.mad.results import ResultsFile, open_results, read_results
from eval.mad.runs import Outcome, Recipe, Run
from eval.mad.scores import task_grids, task_score
from eval.mad.settings import TASKS, Level, Task, settings, tasks_of
from eval.mad.table import score_lines, score_table, solution_table
from eval.mad.train import Report
from eval.report.seed_statistics import Estimate

CPU = torch.device("cpu")
SOFTMAX, PARALLAX = Recipe(attention="softmax"), Recipe(attention="parallax")
KDA = Recipe(attention="kda")


def _outcome(accuracy: float) -> Outcome:
    return Outcome(accuracy=accuracy, loss=1.5, num_epochs=200, seconds=3.25)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Replace training by a list of what was asked for; accuracy is that of the rate's place."""
    runs: list[Run] = []

    def train(members: list[Run], device: torch.device, report: Report, *, is_compiled: bool) -> None:
        for run in members:
            runs.append(run)
            report(run, _outcome(run.lr * 1000 - run.weight_decay))

    monkeypatch.setattr(command, "train", train)
    return runs


def test_a_score_is_the_mean_over_settings_of_the_best_of_six() -> None:
    grids = task_grids(SOFTMAX, "memorization", "full")
    results = {
        run: _outcome(0.01 * i + 0.1 * j) for i, runs in enumerate(grids) for j, run in enumerate(runs)
    }
    score = task_score(results, grids)
    assert score.value == pytest.approx(sum(0.01 * i + 0.5 for i in range(6)) / 6)
    assert (score.num_done, score.num_runs) == (36, 36)
    del results[grids[3][2]]
    score = task_score(results, grids)
    assert (score.value, score.num_done, score.num_runs) == (None, 35, 36)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = task_grids(PARALLAX, "noisy-in-context-recall", "full")[2][3]
    diverged = replace(_outcome(0.0), loss=float("nan"))
    with open_results(tmp_path / "new", CPU) as file:
        file.add(run, _outcome(0.5))
        file.add(replace(run, lr=0.5), diverged)
    read = read_results(tmp_path / "new")
    assert read[run] == _outcome(0.5)
    assert str(read[replace(run, lr=0.5)]) == str(diverged)
    assert ResultsFile(tmp_path / "new", CPU).outcomes.keys() == read.keys()


def test_a_folder_has_one_writer(tmp_path: Path, trained: list[Run]) -> None:
    arguments = ["--attention", "softmax", "--tasks", "compression", "--out", str(tmp_path)]
    with (
        open_results(tmp_path, CPU),
        pytest.raises(UserError, match=r"--out .* is in use by process .*--with"),
    ):
        command.main(arguments)
    assert trained == []
    command.main(arguments)
    assert len(trained) == 6


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path, CPU)
    file.add(task_grids(SOFTMAX, "compression", "baseline")[0][0], _outcome(0.5))
    path = tmp_path / "mad.jsonl"
    path.write_text(path.read_text() + '{"run": 3')
    with pytest.raises(UserError, match=r"line 2 of .*mad\.jsonl.*remove it"):
        ResultsFile(tmp_path, CPU)
    record = json.loads(path.read_text().splitlines()[0])
    record["run"]["recipe"]["optimiser"] = "adamw"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="optimiser"):
        read_results(tmp_path)


def test_a_second_command_trains_what_is_missing(tmp_path: Path, trained: list[Run]) -> None:
    arguments = ["--attention", "softmax", "--tasks", "compression,memorization", "--out", str(tmp_path)]
    command.main(arguments)
    assert len(trained) == len(set(trained)) == 12
    lines = (tmp_path / "mad.jsonl").read_text().splitlines()
    (tmp_path / "mad.jsonl").write_text("\n".join(lines[:5]) + "\n")
    trained.clear()
    command.main(arguments)
    assert len(trained) == 7
    assert sorted((tmp_path / "mad.jsonl").read_text().splitlines()) == sorted(lines)
    trained.clear()
    command.main([*arguments, "--seeds", "12345,1"])
    assert len(trained) == 12
    assert {run.recipe.seed for run in trained} == {1}


def test_results_of_several_folders_are_in_one_table(
    tmp_path: Path, trained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("softmax", "parallax"):
        command.main(["--attention", kind, "--tasks", "selective-copying", "--out", str(tmp_path / kind)])
    capsys.readouterr()
    one, other = str(tmp_path / "softmax"), str(tmp_path / "parallax")
    command.main(["--attention", "softmax", "--tasks", "selective-copying", "--out", one, "--with", other])
    table = capsys.readouterr().out
    head = "| task | parallax, adamw | softmax, adamw | parallax, paper | softmax, paper |"
    assert table.splitlines()[0] == head
    assert table == (tmp_path / "softmax" / "mad.md").read_text()
    assert len(trained) == 12


def test_the_table_shows_missing_runs_the_mean_and_the_paper() -> None:
    results = {
        run: _outcome(0.5 if task == "compression" else 0.75)
        for task in TASKS
        for run in task_grids(KDA, task, "baseline")[0]
    }
    results |= dict.fromkeys(task_grids(PARALLAX, "compression", "baseline")[0][:4], _outcome(1.0))
    lines = score_table(results, TASKS, "baseline").markdown()
    assert lines[0] == "| task | kda, adamw | parallax, adamw | parallax, paper |"
    assert lines[2] == "| in-context-recall | 0.750 | 0 of 6 runs | 0.951 |"
    assert lines[6] == "| compression | 0.500 | 4 of 6 runs | - |"
    assert lines[-1] == "| mean | 0.708 | - | 0.716 |"
    cosine = {replace(run, recipe=replace(KDA, schedule="cosine")): o for run, o in results.items()}
    assert "kda, adamw, constant" in score_table(results | cosine, TASKS, "baseline").markdown()[0]


def _all_runs(recipe: Recipe, tasks: Sequence[Task], level: Level, accuracy: float) -> dict[Run, Outcome]:
    grids = [runs for task in tasks for runs in task_grids(recipe, task, level)]
    return {run: _outcome(accuracy) for runs in grids for run in runs}


def test_the_paper_is_beside_what_its_scores_are_of() -> None:
    results = _all_runs(SOFTMAX, TASKS, "full", 0.5) | _all_runs(SOFTMAX, tasks_of("hard"), "hard", 0.5)
    for level in ("baseline", "full"):
        lines = score_lines(results, TASKS, level)
        assert lines[0].endswith("| softmax, paper |")
        assert lines[-3] == "| mean | 0.500 | 0.672 |"
        assert "means over MAD's settings, those of --level full" in lines[-1]
        # the paper's mean is of six tasks
        some = score_lines(results, ["selective-copying", "compression"], level)
        assert some[2:5] == [
            "| selective-copying | 0.500 | 0.950 |",
            "| compression | 0.500 | - |",
            "| mean | 0.500 | - |",
        ]
    for level in ("rows", "hard"):
        lines = score_lines(results, tasks_of(level), level)
        assert lines[0] == "| task | softmax, adamw |"
        assert lines[-1] == "| mean | 0.500 |"


def test_the_table_has_means_over_seeds() -> None:
    (runs,) = task_grids(KDA, "compression", "baseline")
    others = [replace(run, recipe=replace(KDA, seed=1)) for run in runs]
    results = dict.fromkeys(runs, _outcome(0.5)) | dict.fromkeys(others, _outcome(0.7))
    lines = score_table(results, ["compression"], "baseline").markdown()
    assert lines[0] == "| task | kda, adamw |"
    assert lines[2] == "| compression | 0.600 ± 0.100 |"
    del results[others[3]]
    assert (
        score_table(results, ["compression"], "baseline").markdown()[2] == "| compression | 0.500 (1 of 2) |"
    )


def test_grids_that_end_with_a_solved_run_are_seeds_of_the_same_column() -> None:
    (runs,) = task_grids(KDA, "compression", "baseline")
    early = replace(KDA, seed=1, ends_when_solved=True)
    others = [replace(run, recipe=early) for run in runs]
    results = dict.fromkeys(runs, replace(_outcome(1.0), num_epochs=20))
    results |= {run: replace(_outcome(0.1 * i), num_epochs=4) for i, run in enumerate(others)}
    results[others[3]] = replace(_outcome(1.0), num_epochs=4)
    lines = score_table(results, ["compression"], "baseline").markdown()
    assert lines[0] == "| task | kda, adamw |"
    assert lines[2] == "| compression | 1.000 ± 0.000 |"
    # which of the others would have been solved nobody knows
    assert solution_table(results, ["compression"], "baseline").markdown()[2] == (
        "| compression | epoch 12, 6 of 6 |"
    )
    results[others[3]] = _outcome(0.9)
    assert solution_table(results, ["compression"], "baseline").markdown()[2] == (
        "| compression | epoch 20, 6 of 12 |"
    )
    for run in others[:2]:
        del results[run]
    # of one seed, all runs go before those of a grid that ended early
    results |= {replace(run, recipe=replace(KDA, ends_when_solved=True)): _outcome(0.3) for run in runs[:4]}
    assert score_table(results, ["compression"], "baseline").markdown()[2] == (
        "| compression | 1.000 (1 of 2) |"
    )


def test_a_grid_that_a_solved_run_has_ended_is_complete_without_the_others() -> None:
    early = replace(KDA, ends_when_solved=True)
    (runs,) = task_grids(early, "compression", "baseline")
    (all_trained,) = task_grids(KDA, "compression", "baseline")
    results = {runs[1]: _outcome(0.4), runs[3]: replace(_outcome(0.9995), num_epochs=4)}
    # a start of the same grid with all runs trained does not count
    results |= dict.fromkeys(all_trained[:4], _outcome(0.6))
    assert score_table(results, ["compression"], "baseline").markdown()[2:] == [
        "| compression | 1.000 |",
        "| mean | 1.000 |",
    ]
    assert solution_table(results, ["compression"], "baseline").markdown()[2] == "| compression | epoch 4 |"
    results[runs[3]] = _outcome(0.9)
    assert score_table(results, ["compression"], "baseline").markdown()[2] == "| compression | 4 of 6 runs |"


@pytest.mark.parametrize("end", [[], ["--end-when-solved"]], ids=["all are trained", "ends when solved"])
def test_a_repeated_command_ends_a_grid_whose_solved_run_is_on_file(
    tmp_path: Path, trained: list[Run], end: list[str]
) -> None:
    arguments = ["--attention", "softmax", "--tasks", "compression", *end, "--out", str(tmp_path)]
    recipe = replace(SOFTMAX, ends_when_solved=bool(end))
    run = task_grids(recipe, "compression", "baseline")[0][2]
    with open_results(tmp_path, CPU) as file:
        file.add(run, _outcome(1.0))
    command.main(arguments)
    assert len(trained) == (0 if end else 5)


def test_a_grid_with_all_its_runs_is_not_trained_again_to_the_first_solved_one(
    tmp_path: Path, trained: list[Run]
) -> None:
    arguments = ["--attention", "softmax", "--tasks", "compression", "--out", str(tmp_path)]
    command.main(arguments)
    trained.clear()
    command.main([*arguments, "--end-when-solved"])
    assert trained == []
    # the other way round the runs that a solved one has ended are missing
    command.main([*arguments, "--optimizer", "muon", "--end-when-solved"])
    trained.clear()
    command.main([*arguments, "--optimizer", "muon"])
    assert len(trained) == 6


def test_a_solved_run_ends_its_grid_in_packs_that_have_not_begun(tmp_path: Path, trained: list[Run]) -> None:
    # rows of 2048 tokens: the six runs do not fit at once; the largest rate, in the second pack, is "solved"
    words = ["--attention", "softmax", "--tasks", "in-context-recall", "--level", "hard", "--end-when-solved"]
    command.main([*words, "--out", str(tmp_path)])
    by_setting = Counter(run.setting.name for run in trained)
    assert by_setting == {"V256 L128 N12800": 6, "V512 L128 N12800": 6, "V16 L2048 N12800": 6}
    trained.clear()
    command.main([*words, "--optimizer", "muon", "--out", str(tmp_path)])
    # with Muon the first pack has solved runs
    assert Counter(run.setting.name for run in trained)["V16 L2048 N12800"] == 4
    assert " runs |" not in (tmp_path / "mad.md").read_text()


def test_solved_runs_are_counted_with_their_epochs() -> None:
    (runs,) = task_grids(KDA, "compression", "baseline")
    others = [replace(run, recipe=replace(KDA, seed=1)) for run in runs[:3]]
    results = dict.fromkeys(runs, replace(_outcome(0.998), num_epochs=200))
    results |= {
        runs[2]: replace(_outcome(0.999), num_epochs=7),
        runs[4]: replace(_outcome(1.0), num_epochs=3),
    }
    tasks: list[Task] = ["compression", "memorization"]
    assert solution_table(results, tasks, "baseline").markdown()[2:] == [
        "| compression | epoch 3, 2 of 6 |",
        "| memorization | - |",
    ]
    results |= dict.fromkeys(others, replace(_outcome(1.0), num_epochs=10))
    assert solution_table(results, tasks, "baseline").markdown()[2] == "| compression | epoch 6.5, 5 of 9 |"


def test_plots_are_drawn_where_there_are_scores(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    results = {task_grids(KDA, "compression", "baseline")[0][0]: _outcome(0.5)}
    assert not plot_scores(results, TASKS, "baseline", path)
    assert not plot_difficulty(results, TASKS, path)
    results = {run: _outcome(0.5) for runs in task_grids(KDA, "compression", "full") for run in runs}
    assert not path.exists()
    assert plot_scores(results, TASKS, "baseline", path)
    assert path.exists()
    path.unlink()
    assert plot_difficulty(results, TASKS, path)
    assert path.exists()


def test_difficulty_has_all_seeds_and_schedules_of_all_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, dict[float, tuple[float, int]]]] = []

    def draw(axes: Any, name: str, points: Mapping[float, Estimate], style: Any, *, line: bool) -> None:
        drawn.append((name, {x: (round(each.mean, 6), each.num_seeds) for x, each in points.items()}))

    monkeypatch.setattr(plots, "_draw", draw)
    cosine = replace(KDA, schedule="cosine")
    results = _all_runs(KDA, ["compression"], "full", 0.4)
    results |= _all_runs(replace(KDA, seed=1), ["compression"], "full", 0.8)
    results |= _all_runs(KDA, ["compression"], "hard", 0.2) | _all_runs(cosine, ["compression"], "hard", 0.1)
    assert plot_difficulty(results, TASKS, tmp_path / "plot.png")
    both = dict.fromkeys((16.0, 32.0, 64.0, 128.0), (0.6, 2))
    assert drawn[:2] == [
        ("kda, adamw, constant", both | dict.fromkeys((256.0, 512.0), (0.2, 1))),
        ("kda, adamw, cosine", dict.fromkeys((256.0, 512.0), (0.1, 1))),
    ]


def test_a_plot_of_an_earlier_command_does_not_stay_beside_other_tables(
    tmp_path: Path, trained: list[Run]
) -> None:
    out = ["--out", str(tmp_path)]
    command.main(["--attention", "softmax", "--tasks", "compression", "--level", "full", *out])
    names = ["mad.pdf", "mad.png", "mad_difficulty.pdf", "mad_difficulty.png"]
    assert sorted(path.name for path in tmp_path.glob("*.p*")) == names
    command.main(["--tasks", "memorization", *out])
    assert list(tmp_path.glob("*.p*")) == []


def test_difficulty_goes_from_the_baseline_to_the_hardest() -> None:
    by_size = difficulties("in-context-recall")
    assert [each.vocab_size for each in by_size["vocab_size"]] == [16, 32, 64, 128, 256, 512]
    assert [each.seq_len for each in by_size["seq_len"]] == [128, 256, 512, 1024, 2048]
    assert [each.num_train_rows for each in by_size["num_train_rows"]] == [800, 1600, 3200, 6400, 12800]
    assert [*difficulties("memorization")] == ["vocab_size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "softmax,sofmax"], r"--attention has 'sofmax', want some of softmax,parallax"),
        (["--attention", "softmax", "--tasks", "recall"], r"--tasks has 'recall', want some of in-context"),
        (["--attention", "softmax", "--tasks", "memorization", "--level", "hard"], r"no settings at"),
        (["--attention", "softmax", "--max-epochs", "0"], r"--max-epochs is 0"),
        (["--attention", "softmax", "--grids-per-gpu", "0"], r"--grids-per-gpu is 0"),
        (["--attention", "softmax", "--device", "cpu", "--grids-per-gpu", "2"], r"has no effect on a CPU"),
        (["--attention", "softmax", "--seeds", "1,x"], r"--seeds is '1,x'"),
        (["--attention", "softmax", "--seeds", "9" * 23], r"seed must be at least 0 and at most 92"),
        (["--attention", "softmax", "--with", "nowhere"], r"nowhere has no mad\.jsonl"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_all_tasks_of_a_level_have_settings() -> None:
    for level in get_args(Level):
        assert all(settings(task, level) for task in tasks_of(level))


def test_the_level_rows_has_the_baseline_and_fewer_rows_alone() -> None:
    found = settings("selective-copying", "rows")
    assert [each.num_train_rows for each in found] == [12800, 6400, 3200, 1600, 800]
    assert {replace(each, num_train_rows=0) for each in found} == {replace(found[0], num_train_rows=0)}
    assert set(found) < set(settings("selective-copying", "full"))
    assert tasks_of("rows") == [task for task in TASKS if task != "memorization"]


def test_each_gpu_gets_as_many_processes_as_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []

    def train_on_gpus(packs: object, gpus: list[str], report: Report, *, is_compiled: bool) -> None:
        given.append(gpus)

    monkeypatch.setattr(command, "train_all", train_on_gpus)
    monkeypatch.setattr(command, "check_device", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    words = ["--attention", "softmax", "--tasks", "memorization", "--device", "cuda", "--out", str(tmp_path)]
    command.main(words)
    command.main([*words, "--grids-per-gpu", "2"])
    assert given == [["0", "3"], ["0", "3", "0", "3"]]


def test_without_attention_only_the_table_is_written(
    tmp_path: Path, trained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--attention", "softmax", "--tasks", "compression", "--out", str(tmp_path / "one")])
    trained.clear()
    capsys.readouterr()
    command.main(["--out", str(tmp_path / "two"), "--with", str(tmp_path / "one"), "--tasks", "compression"])
    assert capsys.readouterr().out.startswith("| task | softmax, adamw |")
    assert trained == []


def test_a_real_run_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "NUM_TEST_ROWS", 64)
    arguments = ["--attention", "softmax", "--tasks", "memorization", "--max-epochs", "1", "--device", "cpu"]
    command.main([*arguments, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count(", 1 epochs, ") == 6
    assert "| memorization | 0.0" in printed
