"""Task records: results of downstream tasks as flat records, from training and from results.json files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.tokenizer_content import same_tokenizer
from errors import UserError
from eval.task_results import RESULTS_FILE, mean_accuracy
from models.run_folder import RunFolder, step_of

Record = dict[str, Any]

_MEANS = {"mean_accuracy": True, "mean_plain_accuracy": False}  # name -> whether normalized


def task_record(results: Record) -> Record:
    """Flatten results of tasks to a record.

    Args:
        results: The fields of an eval.task_results.TaskResults, as in results.json.

    Returns:
        "tasks/<task>/<metric>", num_documents, num_cut (requests that did not fit into the model) and
        num_fewshot being metrics too, and "tasks/mean_accuracy" and "tasks/mean_plain_accuracy" unless None.
    """
    record = {f"tasks/{task}/{m}": x for task, found in results["metrics"].items() for m, x in found.items()}
    record |= {f"tasks/{task}/num_documents": num for task, num in results["num_documents"].items()}
    # results of earlier versions have neither
    record |= {f"tasks/{task}/num_cut": cut["num_cut"] for task, cut in results.get("cut", {}).items()}
    record |= {f"tasks/{task}/num_fewshot": num for task, num in results.get("num_fewshot", {}).items()}
    return record | {f"tasks/{name}": results[name] for name in _MEANS if results[name] is not None}


def _wrote(folder: Path, checkpoint: Path) -> bool:
    """Return whether a run wrote a checkpoint; for a run that has been moved since, compare folder names."""
    run = RunFolder.of_checkpoint(checkpoint).path
    return run.resolve() == folder.resolve() if run.exists() else run.name == folder.resolve().name


def read_results(folder: Path, fingerprint: str | None) -> tuple[list[Record], list[str]]:
    """Read each results.json in a run folder or a folder in it.

    Args:
        folder: The run folder.
        fingerprint: Fingerprint of the run's tokenizer; None where it was not recorded.

    Returns:
        Task records, with "step" and "path" of the file, and a note per skipped file: it is damaged, of
        another run, or made with another tokenizer.
    """
    records: list[Record] = []
    notes: list[str] = []
    for path in sorted((*folder.glob(RESULTS_FILE), *folder.glob(f"*/{RESULTS_FILE}"))):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            checkpoint = Path(results["checkpoint"])
            step = step_of(checkpoint)
            if step is None:
                raise UserError(f"checkpoint is {checkpoint}, want a folder step-N")
            record = {"step": step, "path": str(path), **task_record(results)}
            theirs = results.get("tokenizer_fingerprint")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path} was not written by eval.downstream ({error!r}) and was skipped")
            continue
        if not _wrote(folder, checkpoint):
            notes.append(f"{path} is of {checkpoint}, not a checkpoint of {folder}, and was skipped")
        elif theirs is not None and fingerprint is not None and not same_tokenizer(theirs, fingerprint):
            notes.append(
                f"{path} was made with another tokenizer (fingerprint {theirs}) than the run's "
                f"({fingerprint}), and was skipped"
            )
        else:
            records.append(record)
    return records, notes


def _by_task(record: Record) -> dict[str, Record]:
    """Group the items of a task record by task, without the means."""
    tasks: dict[str, Record] = {}
    for key, value in record.items():
        task = key.removeprefix("tasks/").rpartition("/")[0]
        if key.startswith("tasks/") and task:
            tasks.setdefault(task, {})[key] = value
    return tasks


def _means(record: Record) -> Record:
    """Compute the means over a task record's tasks, where it has all eight."""
    metrics = {
        task: {key.rpartition("/")[2]: value for key, value in items.items()}
        for task, items in _by_task(record).items()
    }
    means = {f"tasks/{name}": mean_accuracy(metrics, normalized=flag) for name, flag in _MEANS.items()}
    return {name: value for name, value in means.items() if value is not None}


def merge_tasks(records: Iterable[Record]) -> list[Record]:
    """Merge task records into one per step, with each task's result over the most documents.

    Args:
        records: Records of a run; those without tasks are dropped. At equal numbers of documents the later
            one is kept.

    Returns:
        Records by step, their means recomputed over the merged tasks. "origins": task -> "path" of its
        record, None without one.
    """
    merged: dict[int, Record] = {}
    most: dict[tuple[int, str], int] = {}
    for record in records:
        step, tasks = record["step"], _by_task(record)
        if not tasks:
            continue
        facts = {key: value for key, value in record.items() if not key.startswith("tasks/")}
        path = facts.pop("path", None)
        found = merged.setdefault(step, {"origins": {}})
        found.update(facts)
        for task, values in tasks.items():
            num = record.get(f"tasks/{task}/num_documents", 0)
            if num < most.get((step, task), 0):
                continue
            most[step, task] = num
            for key in _by_task(found).get(task, ()):
                del found[key]
            found.update(values)
            found["origins"][task] = path
    return [found | _means(found) for _, found in sorted(merged.items())]
