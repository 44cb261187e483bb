"""What a run wrote, read back: its resolved config and its metrics. Nothing is built."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError
from eval.task_results import mean_accuracy
from models.run_folder import RunFolder, step_of

Record = dict[str, Any]

_MEANS = {"mean_accuracy": True, "mean_plain_accuracy": False}  # name -> whether normalized


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run folder's content. A branch's records begin with those of the run that it started from.

    Attributes:
        folder: The run folder.
        config: The resolved config, dotted key -> value; keys that are "none" are left out.
        steps: Training records by step, each with its launch's keys (num_ranks, flops_per_token, ...) where
            the run recorded them, "seconds" (of training steps so far), "rank_seconds" (the same times ranks,
            None where those are unknown) and "flops" (None where unknown).
        held_out: Records of the held-out loss by step, with "tokens", "flops", "seconds" as in steps.
        tasks: Records of task evaluations by step, as task_record gives them: from training, and from a
            results.json of the run's checkpoints in the run folder or one below it. Each task is that of the
            most documents, of as many from results.json, and the means are of these; "origins" holds task ->
            path of that file, None for training.
        num_trunk_steps: How many of steps another run took, from which this one branched.
        notes: What a reader must know: damaged lines, missing parts.
    """

    folder: Path
    config: Record
    steps: list[Record] = field(default_factory=list)
    held_out: list[Record] = field(default_factory=list)
    tasks: list[Record] = field(default_factory=list)
    num_trunk_steps: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        """The step after which the run ends by its config; None without a config."""
        steps = self.config.get("training.steps")
        return None if steps is None else min(steps, self.config.get("training.stop_at_step", steps))

    @property
    def budget(self) -> int | None:
        """Tokens up to last_step: as recorded, and by the config where the run is not there yet.

        None without a config. A run that was resumed with another batch has had other tokens than its config
        says.
        """
        if self.last_step is None:
            return None
        before = [record for record in self.steps if record["step"] <= self.last_step]
        step, tokens = (before[-1]["step"], before[-1]["tokens"]) if before else (0, 0)
        batch_tokens = self.config["training.global_batch_size"] * self.config["training.seq_len"]
        return tokens + (self.last_step - step) * batch_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the last step is on record."""
        return bool(self.steps) and self.last_step is not None and self.steps[-1]["step"] >= self.last_step


def flatten(table: Record, prefix: str = "") -> Record:
    """Nested tables as dotted keys; "none" is left out, so that it equals a key that is not there."""
    flat: Record = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif value != "none":
            flat[f"{prefix}{key}"] = value
    return flat


def read_metrics(path: Path) -> tuple[list[Record], list[str]]:
    """Read a metrics.jsonl.

    Args:
        path: The file.

    Returns:
        The records that count, each with the keys of the launch that wrote it: a launch that goes on from
        step N voids what stands before it about later steps. And a note for each damaged line.
    """
    records: list[Record] = []
    notes: list[str] = []
    launch: Record = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            where = "the last line" if number == len(lines) else f"line {number}"
            notes.append(f"{path}: {where} is damaged and was skipped: {line[:60]!r}")
            continue
        if "launch" in record:
            launch = record["launch"]
            records = [earlier for earlier in records if earlier["step"] <= step]
            continue
        records.append({**launch, **record})
    return records, notes


def task_record(results: Record) -> Record:
    """Results of tasks as a flat record.

    Args:
        results: The fields of an eval.task_results.TaskResults, as results.json holds them, too.

    Returns:
        "tasks/<task>/<metric>" with num_documents among the metrics, and "tasks/mean_accuracy" and
        "tasks/mean_plain_accuracy" where there are means.
    """
    record = {f"tasks/{task}/{m}": x for task, found in results["metrics"].items() for m, x in found.items()}
    record |= {f"tasks/{task}/num_documents": num for task, num in results["num_documents"].items()}
    return record | {f"tasks/{name}": results[name] for name in _MEANS if results[name] is not None}


def _last_fingerprint(records: Sequence[Record]) -> str | None:
    found = (record.get("tokenizer_fingerprint") for record in reversed(records))
    return next((each for each in found if each is not None), None)


def tokenizer_fingerprint(run: RunFolder) -> str | None:
    """Of the tokenizer that a run was trained with, from its metrics.jsonl; None where that lacks it."""
    path = run.metrics_file
    return _last_fingerprint(read_metrics(path)[0]) if path.exists() else None


def _wrote(folder: Path, checkpoint: Path) -> bool:
    """Whether a run wrote a checkpoint; a run that was moved since is known by its name."""
    run = RunFolder.of_checkpoint(checkpoint).path
    return run.resolve() == folder.resolve() if run.exists() else run.name == folder.resolve().name


def _read_results(folder: Path, fingerprint: str | None) -> tuple[list[Record], list[str]]:
    """What `python -m eval.downstream --out` wrote into a run folder or a folder in it, with notes.

    Results with another tokenizer than the run's are left out, where both fingerprints are on record.
    """
    records: list[Record] = []
    notes: list[str] = []
    for path in sorted((*folder.glob("results.json"), *folder.glob("*/results.json"))):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            checkpoint = Path(results["checkpoint"])
            record = {"step": step_of(checkpoint), "path": str(path), **task_record(results)}
            theirs = results.get("tokenizer_fingerprint")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path} is no result of eval.downstream ({error!r}) and was skipped")
            continue
        if not _wrote(folder, checkpoint):
            notes.append(f"{path} is of {checkpoint}, which is no checkpoint of {folder}, and was ignored")
        elif None not in (theirs, fingerprint) and theirs != fingerprint:
            notes.append(
                f"{path} was made with another tokenizer (fingerprint {theirs}) than the run's "
                f"({fingerprint}), and was ignored"
            )
        else:
            records.append(record)
    return records, notes


def _by_task(record: Record) -> dict[str, Record]:
    """A task record's items by task; the means are of no task."""
    tasks: dict[str, Record] = {}
    for key, value in record.items():
        task = key.removeprefix("tasks/").rpartition("/")[0]
        if key.startswith("tasks/") and task:
            tasks.setdefault(task, {})[key] = value
    return tasks


def _means(record: Record) -> Record:
    """The means of a task record's own tasks, where it has all that they want."""
    metrics = {
        task: {key.rpartition("/")[2]: value for key, value in items.items()}
        for task, items in _by_task(record).items()
    }
    means = {f"tasks/{name}": mean_accuracy(metrics, normalized=flag) for name, flag in _MEANS.items()}
    return {name: value for name, value in means.items() if value is not None}


def _fullest_tasks(records: Iterable[Record]) -> list[Record]:
    """Task records, one a step: of each task the values from the most documents, the last ones of equals.

    The means are those of the tasks that stand beside them, whatever their own records say.
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


def _by_step(records: Iterable[Record], key: str) -> list[Record]:
    """Records that have a key, the last one of each step."""
    found = {record["step"]: record for record in records if any(k.startswith(key) for k in record)}
    return [found[step] for step in sorted(found)]


def _parent_folder(folder: Path, checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint: where the config says, else beside the branch's own."""
    parent = RunFolder.of_checkpoint(checkpoint).path
    return parent if parent.exists() else folder.parent / parent.name


def _read_folder(folder: Path, seen: tuple[Path, ...] = ()) -> tuple[Record, list[Record], int, list[str]]:
    """A folder's config, its records behind its trunk's, the trunk's last step, and notes."""
    notes: list[str] = []
    run = RunFolder(folder)
    table = run.read_config()
    if table is None:
        notes.append(f"{folder} has no {run.config_file.name}: nothing was trained there")
    config = flatten(table or {})
    own, damaged = read_metrics(run.metrics_file) if run.metrics_file.exists() else ([], [])
    notes += damaged
    start_from = config.get("checkpoint.start_from")
    if start_from is None or folder.resolve() in seen:
        return config, own, 0, notes
    checkpoint = Path(start_from)
    parent, step = _parent_folder(folder, checkpoint), step_of(checkpoint)
    if step is None:
        raise UserError(f"{run.config_file}: checkpoint.start_from is {start_from!r}, wanted a folder step-N")
    if not RunFolder(parent).metrics_file.exists():
        notes.append(
            f"{folder} branched from {start_from}, whose run is not there: its curves and cost begin at "
            f"step {step + 1}"
        )
        return config, own, 0, notes
    _, before, _, parent_notes = _read_folder(parent, (*seen, folder.resolve()))
    trunk = [record for record in before if record["step"] <= step]
    return config, trunk + [r for r in own if r["step"] > step], step, notes + parent_notes


def _add_costs(steps: list[Record]) -> None:
    seconds, rank_seconds = 0.0, 0.0
    known = True
    for record in steps:
        seconds += record["step_seconds"]
        known = known and "num_ranks" in record
        rank_seconds += record["step_seconds"] * record.get("num_ranks", 0)
        record["seconds"] = seconds
        record["rank_seconds"] = rank_seconds if known else None
        flops = record.get("flops_per_token")
        record["flops"] = None if flops is None else flops * record["tokens"]


def _add_positions(records: list[Record], steps: list[Record]) -> None:
    """Give evaluations the tokens, FLOPs and seconds of their step."""
    by_step = {step["step"]: step for step in steps}
    for record in records:
        known = record.get("flops_per_token") is not None
        start = {"tokens": 0, "flops": 0.0 if known else None, "seconds": 0.0}
        at = start if record["step"] == 0 else by_step.get(record["step"], {})
        record.update({key: at.get(key, record.get(key)) for key in start})


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Args:
        folder: The folder; one without records gives a run without steps and a note.

    Raises:
        ValueError: There is no such folder, or its config is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run folder: there is no such folder; want one such as runs/NAME")
    config, records, trunk_step, notes = _read_folder(folder)
    steps = _by_step(records, "loss")
    results, damaged = _read_results(folder, _last_fingerprint(records))
    notes += damaged
    held_out, tasks = _by_step(records, "validation_loss"), _fullest_tasks([*records, *results])
    _add_costs(steps)
    _add_positions(held_out, steps)
    _add_positions(tasks, steps)
    notes += [
        f"{folder}: at step {record['step']} an evaluation failed: {record['eval_error']}"
        for record in records
        if "eval_error" in record
    ]
    if not steps:
        notes.append(f"{folder} holds no training step")
    elif steps[0]["step"] > 1 and not any("branched" in note for note in notes):
        notes.append(f"{folder}: the record begins at step {steps[0]['step']}; time and cost lack the rest")
    run = RunRecord(
        folder=folder,
        config=config,
        steps=steps,
        held_out=held_out,
        tasks=tasks,
        num_trunk_steps=sum(step["step"] <= trunk_step for step in steps),
        notes=notes,
    )
    if steps and not run.is_finished:
        notes.append(f"{folder} is not finished: step {steps[-1]['step']} of {run.last_step}")
    return run
