"""Runs of other data, tokenizers, budgets or held-out documents are not compared, unless on request."""

from pathlib import Path

import pytest

from errors import run_command
from eval.report.__main__ import main
from eval.report.comparable import incomparable, mixed_origins
from eval.report.run_records import read_run
from eval.report.writer import write_report
from tests.eval.report.run_folders import (
    STEP_TOKENS,
    STEPS,
    cells,
    held_out,
    launch,
    make_run,
    report,
    training,
)

HELD_OUT = "Held-out loss (nats/token)"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("data.train.files", ("--data.train.files", '["other.parquet"]')),
        ("data.train.min_score", ("--data.train.min_score", "0.5")),
        ("data.tokenizer", ("--data.tokenizer", "other/tokenizer.json")),
        ("token budget", ("--training.stop_at_step", "29")),
        ("eval.max_tokens", ("--eval.max_tokens", "7")),
    ],
)
def test_different_data_tokenizer_or_budget_is_refused_unless_allowed(
    key: str, words: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [launch(tokenizer_fingerprint=None), *training(2.0)]
    first = make_run(tmp_path / "a", records)
    second = make_run(tmp_path / "b", records, *words)
    with pytest.raises(ValueError, match="not comparable") as raised:
        report([first, second], tmp_path)
    assert key in str(raised.value)
    out = ("--out", str(tmp_path / "out"))
    assert run_command(lambda: main([str(first), str(second), *out])) == 2
    assert key in capsys.readouterr().err
    main([str(first), str(second), "--allow-different", *out])
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("not comparable") < text.index(key) < text.index("## Runs")


def test_of_another_kind_of_source_the_kind_alone_is_named(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", [launch(), *training(2.0)])
    words = ("--data.train.kind", "text", "--data.train.folder", "texts")
    second = make_run(tmp_path / "b", [launch(), *training(2.0)], *words)
    problems = incomparable([read_run(first), read_run(second)])
    assert problems == ["data.train.kind is 'parquet' in a and 'text' in b"]


def test_tables_and_plots_of_an_earlier_report_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "a", [launch(), *training(2.0)]), tmp_path / "out"
    main([str(run), "--out", str(out)])
    main([str(run), "--out", str(out)])
    assert "of another report" not in capsys.readouterr().out
    (out / "old.csv").touch()
    main([str(run), "--out", str(out)])
    said = f"{out} also has tables or plots of another report, such as {out / 'old.csv'}"
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_tokenizers_are_compared_by_their_recorded_fingerprints(tmp_path: Path) -> None:
    here = make_run(tmp_path / "a", [launch(), *training(2.0)])
    moved = make_run(tmp_path / "b", [launch(), *training(2.0)], "--data.tokenizer", "moved/tokenizer.json")
    assert "not comparable" not in report([here, moved], tmp_path)
    other = make_run(tmp_path / "c", [launch(tokenizer_fingerprint="e" * 16), *training(2.0)])
    with pytest.raises(ValueError, match=r"data\.tokenizer"):
        report([here, other], tmp_path)


def test_losses_of_other_held_out_documents_are_not_compared(tmp_path: Path) -> None:
    counts = ({}, {"validation_documents": 40, "validation_stderr": 0.0123}, {"validation_documents": 50})
    folders = [
        make_run(tmp_path / str(n), [launch(), *training(2.0), {**held_out(STEPS, 2.0), **each}])
        for n, each in enumerate(counts)
    ]
    # a run of an earlier version did not record its number of documents
    text = write_report(folders[:2], baseline=None, out=tmp_path / "out").read_text()
    row = cells(text, "Results", "Parallax, Muon (1)")
    assert [row[HELD_OUT], row["S.e. over documents (nats/token)"]] == ["**2.0000**", "0.0123"]
    with pytest.raises(ValueError, match="validation_documents is 40 in 1 and 50 in 2"):
        write_report(folders[1:], baseline=None, out=tmp_path / "out")


def test_a_run_that_changes_its_held_out_text_says_so(tmp_path: Path) -> None:
    # a resume with a version that samples rows instead of documents
    counts = [(249_708, 292), (249_708, 292), (249_321, 701)]
    evaluations = [
        {**held_out(step, 2.0), "validation_tokens": tokens, "validation_documents": documents}
        for step, (tokens, documents) in zip((0, 15, STEPS), counts, strict=True)
    ]
    folder = make_run(tmp_path / "a", [launch(), *training(2.0), *evaluations])
    notes = [note for note in read_run(folder).notes if "other text" in note]
    assert notes == [
        f"{folder}: from step {STEPS} on the held-out loss is measured on other text: 249321 tokens of 701 "
        "documents, before 249708 of 292"
    ]
    same = [evaluations[0], {**evaluations[1], "step": STEPS}]
    other = make_run(tmp_path / "b", [launch(), *training(2.0), *same])
    assert not [note for note in read_run(other).notes if "other text" in note]
    with pytest.raises(ValueError, match="validation_documents is 701 in a and 292 in b"):
        write_report([folder, other], baseline=None, out=tmp_path / "out")


def test_a_branch_that_restarts_its_data_is_not_compared_with_a_run_on_one_data_set(tmp_path: Path) -> None:
    trunk = make_run(tmp_path / "trunk", [launch(), *training(2.0)])
    start = ("--checkpoint.start_from", str(trunk / "checkpoint" / "step-20"))
    # longer rows cost more FLOPs per token
    own = [launch(20, flops_per_token=200.0), *training(1.0, first=21)]
    branch = make_run(tmp_path / "branch", own, *start, "--checkpoint.restart_data", "true")
    assert read_run(branch).steps[-1]["flops"] == 100.0 * 20 * STEP_TOKENS + 200.0 * 10 * STEP_TOKENS
    with pytest.raises(ValueError, match=r"checkpoint\.restart_data is False in trunk and True in branch"):
        write_report([trunk, branch], baseline=None, out=tmp_path / "out")


def test_tasks_of_other_numbers_of_few_shot_examples_are_not_compared(tmp_path: Path) -> None:
    folders = []
    for name, num in (("a", 0), ("b", 5)):
        tasks = {"step": STEPS, "tasks/sciq/acc": 0.5, "tasks/sciq/num_fewshot": num}
        words = ("--training.max_grad_norm", str(num + 1))
        folders.append(make_run(tmp_path / name, [launch(), *training(2.0), tasks], *words))
    with pytest.raises(ValueError, match="sciq/num_fewshot is 0 in a and 5 in b"):
        report(folders, tmp_path)
    counts = cells(report(folders, tmp_path, allow_different=True), "All tasks", "sciq/num_fewshot")
    assert [*counts.values()][1:] == ["0", "5"]


def test_a_run_that_lacks_a_fact_does_not_hide_that_others_differ_in_it(tmp_path: Path) -> None:
    started = make_run(tmp_path / "a", [launch(tokenizer_fingerprint=None), *training(2.0, last=5)])
    folders = [started]
    for name, tokens, num, fingerprint in (("b", 500, 0, "b" * 16), ("c", 999, 5, "c" * 16)):
        evaluation = {**held_out(STEPS, 2.0), "validation_tokens": tokens}
        tasks = {"step": STEPS, "tasks/sciq/num_documents": tokens, "tasks/sciq/num_fewshot": num}
        records = [launch(tokenizer_fingerprint=fingerprint), *training(2.0), evaluation, tasks]
        folders.append(make_run(tmp_path / name, records))
    for order in (folders[1:], folders, [folders[1], started, folders[2]]):
        problems = incomparable([read_run(folder) for folder in order])
        names = ["data.tokenizer", "tasks/sciq/num_documents", "tasks/sciq/num_fewshot", "validation_tokens"]
        assert [problem.split(" is ")[0] for problem in problems] == names
        assert all(" in b" in problem and " in c" in problem for problem in problems)
    assert incomparable([read_run(folder) for folder in folders[:2]]) == []


def test_runs_of_several_commits_devices_or_versions_of_torch_are_named(tmp_path: Path) -> None:
    def run(name: str, *commits: str, **made_by: object) -> Path:
        records = [
            {**launch(first - 1), "launch": {**launch()["launch"], "git_commit": commit * 10, **made_by}}
            for first, commit in zip((1, 11), commits, strict=False)
        ]
        return make_run(
            tmp_path / name, [*records[:1], *training(2.0, last=10), *records[1:], *training(2.0, 11)]
        )

    a, b = run("a", "a", git_is_clean=True), run("b", "a", "c", git_is_clean=True)
    other = run("other", "a", git_is_clean=False, device="NVIDIA B200", versions={"torch": "3.0"})
    silent = make_run(tmp_path / "silent", [launch(device=None), *training(2.0)])
    found = mixed_origins([read_run(each) for each in (a, b, other, silent, a)])
    due = "to which part of their differences may be due"
    assert found == [
        f"The runs are of several commits, {due}: aaaaaaaaa (1 of the runs, such as a), aaaaaaaaa, then "
        "ccccccccc (1 of the runs, such as b), aaaaaaaaa with changes (1 of the runs, such as other).",
        f"The runs are of several devices, {due}: NVIDIA H100 (2 of the runs, such as a), NVIDIA B200 "
        "(1 of the runs, such as other).",
    ]
    text = write_report([a, b], baseline=None, out=tmp_path / "out").read_text()
    assert "* The runs are of several commits" in text
    assert mixed_origins([read_run(each) for each in (a, silent)]) == []
