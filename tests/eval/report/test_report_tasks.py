"""Results of tasks in the report: those over the most documents, of the run's own checkpoints alone."""

import json
from pathlib import Path

import pytest

from eval.report.run_records import read_run
from eval.task_results import ACCURACIES
from tests.eval.report.run_folders import STEPS, cells, launch, make_run, report, training, write_results


def test_results_are_shown_beside_the_paper_s(tmp_path: Path) -> None:
    folders = []
    for name, accuracy in (("parallax", 0.56), ("softmax", 0.54)):
        tasks = {
            "tasks/lambada_openai/perplexity": 19.0,
            "tasks/lambada_openai/perplexity_stderr": 0.5,
            "tasks/wikitext/word_perplexity": 22.0,
            **{f"tasks/{task}/acc_norm": accuracy for task in ACCURACIES},
            **{f"tasks/{task}/acc": accuracy for task in ACCURACIES},
            "tasks/sciq/acc": 0.9,
        }
        records = [launch(), *training(2.0), {"step": 10, "tasks/sciq/acc": 0.1}, {"step": STEPS, **tasks}]
        folders.append(make_run(tmp_path / name, records, name=f"0.6b_{name}_muon"))
    text = report(folders, tmp_path, baseline="softmax")
    numbers = ["**19.00**", "18.56", "**22.00**", "22.25", "**56.00**", "55.99"]
    ours = ("LAMBADA perplexity", "WikiText perplexity", "Mean accuracy (%)")
    headings = [heading for each in ours for heading in (each, f"{each}, paper")]
    row = cells(text, "Results", "Parallax, Muon")
    assert [row[heading] for heading in headings] == numbers
    row = cells(text, "Results", "Softmax, Muon")
    assert [row[f"{each}, paper"] for each in ours] == ["22.15", "23.43", "54.54"]
    assert row["Mean accuracy (%)"] == "54.00"
    assert [*cells(text, "All tasks", "sciq/acc").values()][1:] == ["**0.9000**", "**0.9000**"]
    assert "stderr" not in text
    row = cells(text, "Difference to Softmax, Muon", "Parallax, Muon")
    assert [row[each] for each in ours] == [f"{each} (1 pair)" for each in ("+0.00", "+0.00", "+2.00")]
    assert "arXiv 2605.29157" in text


def test_a_task_is_not_confused_with_one_whose_name_it_begins(tmp_path: Path) -> None:
    found = {
        "parallax": {"tasks/mmlu/acc": 0.3, "tasks/lambada_openai/perplexity": 19.0},
        "softmax": {"tasks/mmlu_pro/acc": 0.1, "tasks/lambada_standard/perplexity": 30.0},
    }
    folders = []
    for name, tasks in found.items():
        records = [launch(), *training(2.0), {"step": STEPS, **tasks}]
        folders.append(make_run(tmp_path / name, records, name=f"debug_{name}_muon"))
    text = report(folders, tmp_path)
    rows = ("Parallax, Muon", "Softmax, Muon")
    assert [cells(text, "All tasks", "mmlu/acc")[row] for row in rows] == ["0.3000", "-"]
    assert [cells(text, "All tasks", "mmlu_pro/acc")[row] for row in rows] == ["-", "0.1000"]
    assert [cells(text, "Results", row)["LAMBADA perplexity"] for row in rows] == ["19.00", "-"]


def test_what_was_cut_and_the_few_shot_examples_are_shown_and_the_latter_must_be_equal(
    tmp_path: Path,
) -> None:
    folders = []
    for name, num_fewshot in (("parallax", 0), ("softmax", 5)):
        folders.append(make_run(tmp_path / name, [launch(), *training(2.0)], name=f"debug_{name}_muon"))
        counts = {"num_requests": 4, "num_cut": num_fewshot + 1, "num_tokens": 90, "num_dropped": 7}
        checkpoint = folders[-1] / "checkpoint" / f"step-{STEPS}"
        more = {"cut": {"sciq": counts}, "num_fewshot": {"sciq": num_fewshot}}
        write_results(folders[-1] / "tasks" / "results.json", checkpoint, {"sciq": 0.5}, 4, **more)
    text = report(folders, tmp_path, allow_different=True)
    assert [*cells(text, "All tasks", "sciq/num_cut").values()][1:] == ["1", "6"]
    assert [*cells(text, "All tasks", "sciq/num_fewshot").values()][1:] == ["0", "5"]
    with pytest.raises(ValueError, match="sciq/num_fewshot is 0 in parallax and 5 in softmax"):
        report(folders, tmp_path)


def test_results_of_a_later_evaluation_of_a_checkpoint_are_included(tmp_path: Path) -> None:
    folders = []
    for name in ("parallax", "softmax"):
        records = [launch(), *training(2.0), {"step": STEPS, "tasks/sciq/acc": 0.1}]
        folders.append(make_run(tmp_path / name, records, name=f"debug_{name}_muon"))
    results = {
        **{"checkpoint": "", "harness": "0.4.13", "limit": 200},
        **{"metrics": {"sciq": {"acc": 0.75}}, "num_documents": {"sciq": 200}, "mean_accuracy": None},
        **{"mean_plain_accuracy": None, "num_tokens": 9, "num_reused": 0, "seconds": 1.0},
    }
    for folder, num_documents in zip(folders, (200, 100), strict=True):
        (folder / "tasks").mkdir()
        results["checkpoint"] = f"before_a_move/{folder.name}/checkpoint/step-{STEPS}"
        results["num_documents"] = {"sciq": num_documents}
        (folder / "tasks" / "results.json").write_text(json.dumps(results))
    text = report(folders, tmp_path, allow_different=True)
    assert [*cells(text, "All tasks", "sciq/acc").values()][1:] == ["**0.7500**", "**0.7500**"]
    counts = cells(text, "All tasks", "sciq/num_documents")
    assert [counts["Parallax, Muon"], counts["Softmax, Muon"]] == ["200", "100"]
    with pytest.raises(
        ValueError, match="sciq/num_documents is 200 in parallax and 100 in softmax"
    ) as raised:
        report(folders, tmp_path)
    assert f"(from {folders[0]}/tasks/results.json and {folders[1]}/tasks/results.json)" in str(raised.value)
    (folders[0] / "results.json").write_text("[]")
    assert "results.json was not written by eval.downstream" in report(
        folders, tmp_path, allow_different=True
    )


def test_results_of_another_run_are_skipped_and_noted(tmp_path: Path) -> None:
    folder, other = (make_run(tmp_path / name, [launch(), *training(2.0)]) for name in "ab")
    for name, run in (("there", other), ("gone", tmp_path / "deleted")):
        checkpoint = run / "checkpoint" / f"step-{STEPS}"
        write_results(folder / name / "results.json", checkpoint, {"sciq": 0.9}, 8)
    text = report([folder], tmp_path)
    assert "All tasks" not in text
    for name in ("there", "gone"):
        assert f"{folder / name / 'results.json'} is of {tmp_path}" in text
    assert text.count(f"not a checkpoint of {folder}, and was skipped") == 2
    write_results(
        folder / "there" / "results.json", folder / "checkpoint" / f"step-{STEPS}", {"sciq": 0.9}, 8
    )
    assert cells(report([folder], tmp_path), "All tasks", "sciq/acc")["Parallax, Muon"] == "0.9000"


def test_each_task_has_its_result_over_the_most_documents(tmp_path: Path) -> None:
    trained = {"tasks/piqa/acc": 0.3, "tasks/piqa/brier_score": 0.4, "tasks/piqa/num_documents": 8}
    folder = make_run(tmp_path / "a", [launch(), *training(2.0), {"step": STEPS, **trained}])
    checkpoint = folder / "checkpoint" / f"step-{STEPS}"
    write_results(folder / "1_whole" / "results.json", checkpoint, {"sciq": 0.7, "piqa": 0.6}, 1000)
    write_results(folder / "2_quick" / "results.json", checkpoint, {"sciq": 0.5, "boolq": 1.0}, 2)
    tasks = read_run(folder).tasks[-1]
    assert [tasks[f"tasks/{task}/acc"] for task in ("sciq", "piqa", "boolq")] == [0.7, 0.6, 1.0]
    assert "tasks/piqa/brier_score" not in tasks
    assert tasks["origins"]["boolq"] == str(folder / "2_quick" / "results.json")


def test_the_mean_accuracy_is_recomputed_over_the_shown_accuracies(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [launch(), *training(2.0)])
    checkpoint = folder / "checkpoint" / f"step-{STEPS}"
    quick = {"mean_accuracy": 0.3, "mean_plain_accuracy": 0.3}
    write_results(folder / "quick" / "results.json", checkpoint, dict.fromkeys(ACCURACIES, 0.3), 100, **quick)
    for task in ACCURACIES:
        write_results(folder / f"whole_{task}" / "results.json", checkpoint, {task: 0.5}, 1000)
    text = report([folder], tmp_path)
    assert cells(text, "Results", "Parallax, Muon")["Mean accuracy (%)"] == "50.00"
    for name in ("mean_accuracy", "mean_plain_accuracy", "sciq/acc_norm"):
        assert cells(text, "All tasks", name)["Parallax, Muon"] == "0.5000"
    (folder / "quick" / "results.json").unlink()
    assert cells(report([folder], tmp_path), "Results", "Parallax, Muon")["Mean accuracy (%)"] == "50.00"
    (folder / "whole_sciq" / "results.json").unlink()
    assert "Mean accuracy (%)" not in cells(report([folder], tmp_path), "Results", "Parallax, Muon")


def test_results_with_another_tokenizer_are_skipped_and_noted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [launch(), *training(2.0)])
    checkpoint = folder / "checkpoint" / f"step-{STEPS}"
    for name, value, fingerprint in (("own", 0.4, "f" * 16), ("other", 0.9, "e" * 16)):
        path = folder / name / "results.json"
        write_results(path, checkpoint, {name: value}, 8, tokenizer_fingerprint=fingerprint)
    write_results(folder / "old" / "results.json", checkpoint, {"old": 0.5}, 8)
    text = report([folder], tmp_path)
    assert cells(text, "All tasks", "own/acc")["Parallax, Muon"] == "0.4000"
    assert cells(text, "All tasks", "old/acc")["Parallax, Muon"] == "0.5000"
    assert "other/acc" not in text
    reason = f"(fingerprint {'e' * 16}) than the run's ({'f' * 16}), and was skipped"
    assert f"{folder / 'other' / 'results.json'} was made with another tokenizer {reason}" in text
