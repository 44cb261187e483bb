"""`python -m eval.mad`: what it trains, results that resume, and its options."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from errors import UserError
from eval.mad import __main__ as command
from eval.mad import examples
from eval.mad.results import ResultsFile, open_results, read_results
from eval.mad.runs import Outcome, Recipe, Run
from eval.mad.scores import task_grids
from eval.mad.settings import TASKS, Level, settings, tasks_of
from eval.mad.train import Report

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


@pytest.mark.parametrize("words", [["--set", "nonsense=1"], ["--sizes", "N3200"]], ids=lambda words: words[0])
def test_what_is_to_be_trained_needs_an_attention(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--set and --sizes have no effect without --attention"):
        command.main([*words, "--out", str(tmp_path)])


def test_some_sizes_of_a_level_are_trained(tmp_path: Path, trained: list[Run]) -> None:
    arguments = ["--attention", "softmax", "--tasks", "compression,in-context-recall", "--out", str(tmp_path)]
    command.main([*arguments, "--level", "full", "--sizes", "N3200,V64"])
    names = sorted({f"{run.setting.task} {run.setting.name}" for run in trained})
    assert names == [
        "compression V16 L32 N3200",
        "compression V64 L32 N12800",
        "in-context-recall V16 L128 N3200",
        "in-context-recall V64 L128 N12800",
    ]
    assert len(trained) == 24
    with pytest.raises(UserError, match="--sizes has 'N3200', want some of L32,L128,N12800,V16"):
        command.main([*arguments, "--sizes", "N3200"])


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


def test_a_plot_of_an_earlier_command_does_not_stay_beside_other_tables(
    tmp_path: Path, trained: list[Run]
) -> None:
    out = ["--out", str(tmp_path)]
    command.main(["--attention", "softmax", "--tasks", "compression", "--level", "full", *out])
    names = ["mad.pdf", "mad.png", "mad_difficulty.pdf", "mad_difficulty.png"]
    assert sorted(path.name for path in tmp_path.glob("*.p*")) == names
    command.main(["--tasks", "memorization", *out])
    assert list(tmp_path.glob("*.p*")) == []


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
        (["--attention", "softmax", "--seeds", "9" * 23], r"--seeds has 9{23}, want integers from 0 to 92"),
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
