"""Records of a run, read from its folder: config and metrics, those of a branch with its trunk's."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from eval.diagnostics.record import compact, read_records
from eval.report.step_ranges import format_ranges, missing_ranges
from eval.report.task_records import Record, merge_tasks, read_results
from models.run_folder import RunFolder, step_of

# key of a kind of record -> its numbers, without which it counts for nothing; NaN is one
_NEEDED = {"loss": ("loss", "tokens", "step_seconds"), "validation_loss": ("validation_loss",)}


class Failure(NamedTuple):
    """An evaluation that failed during training.

    Attributes:
        step: The step after which it was due.
        name: What failed, such as "eval.tasks".
        message: The error.
    """

    step: int
    name: str
    message: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The records of a run. Those of a branch begin with those of the run that it started from, its trunk.

    Attributes:
        folder: The run folder.
        config: The resolved config, dotted key -> value; keys that are "none" are left out.
        steps: Training records by step, each with the keys of its launch (num_ranks, flops_per_token, ...)
            where recorded, "seconds" (of training steps so far; None where earlier steps are not on record),
            "rank_seconds" (the same times ranks; None where the ranks are unknown too) and "flops" (None
            where unknown).
        held_out: Records of the held-out loss by step, with "tokens", "flops", "seconds" as in steps.
        tasks: Task records by step, merged by merge_tasks from those of training and of results.json files.
            "origins": task -> path of its results.json, None for training.
        diagnostics: Records of diagnostics by step, as eval.diagnostics.record.compact returns them.
        failures: Evaluations that failed, in the order of their records.
        num_trunk_steps: Number of steps that the trunk took, also where its records are missing; 0 without
            one.
        notes: Damaged lines and missing parts, for the report.
    """

    folder: Path
    config: Record
    steps: list[Record] = field(default_factory=list)
    held_out: list[Record] = field(default_factory=list)
    tasks: list[Record] = field(default_factory=list)
    diagnostics: list[Record] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    num_trunk_steps: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        """The last step by the config; None without a config."""
        steps = self.config.get("training.steps")
        if steps is None:
            return None
        stop = self.config.get("training.stop_at_step", steps)
        tokens = self.config.get("training.stop_at_tokens", steps * self.batch_tokens)
        return min(steps, stop, -(-tokens // self.batch_tokens))

    @property
    def batch_tokens(self) -> int:
        """Tokens per step by the config, which there must be."""
        return self.config["training.global_batch_size"] * self.config["training.seq_len"]

    @property
    def budget(self) -> int | None:
        """Tokens up to last_step: as recorded, plus those of the config for steps still to come.

        None without a config. After a resume with another batch size the recorded tokens are not those of
        the config.
        """
        if self.last_step is None:
            return None
        taken = [record for record in self.steps if record["step"] <= self.last_step]
        step, tokens = (taken[-1]["step"], taken[-1]["tokens"]) if taken else (0, 0)
        return tokens + (self.last_step - step) * self.batch_tokens

    @property
    def own_steps(self) -> list[Record]:
        """The training records of the run itself, without those of its trunk."""
        return [record for record in self.steps if record["step"] > self.num_trunk_steps]

    @property
    def is_finished(self) -> bool:
        """Whether the last step was recorded."""
        return bool(self.steps) and self.last_step is not None and self.steps[-1]["step"] >= self.last_step


def flatten(table: Record, prefix: str = "") -> Record:
    """Flatten nested tables to dotted keys; drop those that are "none", so that they equal unset ones."""
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
        The valid records, each with the keys of the launch that wrote it, and a note per damaged line. A
        launch that resumes from step N invalidates earlier records of later steps.
    """
    records: list[Record] = []
    notes: list[str] = []
    launch: Record = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
            if not isinstance(step, int):
                raise TypeError(f"step is {step!r}, want a number")
            _check_numbers(record)
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


def _check_numbers(record: Record) -> None:
    """Raise KeyError or TypeError if a record of a step or of a held-out loss lacks a number it needs."""
    for key, needed in _NEEDED.items():
        for name in needed if key in record else ():
            if not isinstance(record[name], int | float):
                raise TypeError(f"{name} is {record[name]!r}, want a number")


def _last_fingerprint(records: Sequence[Record]) -> str | None:
    found = (record.get("tokenizer_fingerprint") for record in reversed(records))
    return next((each for each in found if each is not None), None)


def tokenizer_fingerprint(run: RunFolder) -> str | None:
    """Return the fingerprint of the tokenizer that a run was trained with; None where it was not recorded."""
    path = run.metrics_file
    return _last_fingerprint(read_metrics(path)[0]) if path.exists() else None


def _by_step(records: Iterable[Record], key: str) -> list[Record]:
    """Return the records with a key, the last one of each step."""
    found = {record["step"]: record for record in records if key in record}
    return [found[step] for step in sorted(found)]


def _parent_folder(folder: Path, checkpoint: Path) -> Path | None:
    """Return the folder of the run that wrote a checkpoint; if it has been moved, one of its name.

    That is in a plan's folder, where runs are in folders of their stages, or beside folder. None where there
    is none with records but folder itself, which may have its trunk's name.
    """
    parent = RunFolder.of_checkpoint(checkpoint).path
    in_plan = folder.parent.parent / parent.parent.name / parent.name
    return next(
        (
            each
            for each in (parent, in_plan, folder.parent / parent.name)
            if RunFolder(each).metrics_file.exists() and each.resolve() != folder.resolve()
        ),
        None,
    )


def _read_folder(folder: Path, seen: tuple[Path, ...] = ()) -> tuple[Record, list[Record], int, list[str]]:
    """Return a folder's config, its records after those of its trunk, the trunk's last step, and notes."""
    notes: list[str] = []
    run = RunFolder(folder)
    table = run.read_config()
    if table is None:
        notes.append(f"{folder} has no {run.config_file.name}: what was run there is not known")
    config = flatten(table or {})
    own, damaged = read_metrics(run.metrics_file) if run.metrics_file.exists() else ([], [])
    notes += damaged
    start_from = config.get("checkpoint.start_from")
    if start_from is None or folder.resolve() in seen:
        return config, own, 0, notes
    checkpoint = Path(start_from)
    parent, step = _parent_folder(folder, checkpoint), step_of(checkpoint)
    if step is None:
        raise UserError(f"{run.config_file}: checkpoint.start_from is {start_from!r}, want a folder step-N")
    earlier, parent_notes = [], []
    if parent is not None:
        _, earlier, _, parent_notes = _read_folder(parent, (*seen, folder.resolve()))
    trunk = [record for record in earlier if record["step"] <= step]
    if not any("loss" in record for record in trunk):
        notes.append(
            f"{folder} branched from {start_from}, whose run is missing: its curves begin at "
            f"step {step + 1}, its FLOPs and hours are not known"
        )
        return config, own, step, notes
    return config, trunk + [r for r in own if r["step"] > step], step, notes + parent_notes


def _read_diagnostics(folder: Path, config: Record, seen: tuple[Path, ...] = ()) -> list[Record]:
    """Return the diagnostics of a run by step, those of a branch with its trunk's."""
    file = RunFolder(folder).diagnostics_file
    own = [compact(record) for record in read_records(file)] if file.exists() else []
    start_from = config.get("checkpoint.start_from")
    step = None if start_from is None else step_of(Path(start_from))
    if start_from is None or step is None or folder.resolve() in seen:
        return own
    parent = _parent_folder(folder, Path(start_from))
    if parent is None:
        return own
    table = RunFolder(parent).read_config()
    earlier = _read_diagnostics(parent, flatten(table or {}), (*seen, folder.resolve()))
    return [r for r in earlier if r["step"] <= step] + [r for r in own if r["step"] > step]


def _is_run(folder: Path) -> bool:
    run = RunFolder(folder)
    return run.metrics_file.exists() or run.config_file.exists()


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Find the run folders among folders and in them.

    Args:
        folders: Run folders, folders of run folders at any depth, or folders without any;
            hidden folders and links in them are left out.

    Returns:
        Run folders, each once under its first path, those in a folder by name; a folder with none in it is
        left out.

    Raises:
        UserError: There is no such folder.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; want a run folder such as runs/NAME, or runs")
        for run in _runs_in(folder):
            found.setdefault(run.resolve(), run)
    return [*found.values()]


def _runs_in(folder: Path) -> list[Path]:
    if _is_run(folder):
        return [folder]
    inside = sorted(each for each in folder.iterdir() if each.is_dir() and not each.is_symlink())
    return [run for each in inside if not each.name.startswith(".") for run in _runs_in(each)]


def _other_samples(folder: Path, held_out: list[Record]) -> list[str]:
    """Return a note where the held-out text changes within a run, as by a resume with another version."""

    def counts(record: Record) -> tuple[Any, ...]:
        return tuple(record.get(key) for key in ("validation_tokens", "validation_documents"))

    return [
        f"{folder}: from step {later['step']} on the held-out loss is measured on other text: "
        f"{counts(later)[0]} tokens of {counts(later)[1]} documents, before {counts(earlier)[0]} of "
        f"{counts(earlier)[1]}"
        for earlier, later in pairwise(held_out)
        if counts(earlier) != counts(later)
    ]


def _add_costs(steps: list[Record]) -> None:
    """Add cumulative seconds, rank-seconds and FLOPs to training records; None where they are not known."""
    seconds, rank_seconds, flops, tokens = 0.0, 0.0, 0.0, 0
    is_complete = has_ranks = True
    # tokens before the first record may have cost another number of FLOPs each
    has_flops = bool(steps) and steps[0]["step"] == 1
    for number, record in enumerate(steps, 1):
        is_complete = is_complete and record["step"] == number
        has_ranks = has_ranks and "num_ranks" in record
        seconds += record["step_seconds"]
        rank_seconds += record["step_seconds"] * record.get("num_ranks", 0)
        record["seconds"] = seconds if is_complete else None
        record["rank_seconds"] = rank_seconds if is_complete and has_ranks else None
        # not times all tokens: a branch with longer rows spends more per token than its trunk
        has_flops = has_flops and "flops_per_token" in record
        flops += record.get("flops_per_token", 0) * (record["tokens"] - tokens)
        tokens = record["tokens"]
        record["flops"] = flops if has_flops else None


def _add_progress(records: list[Record], steps: list[Record]) -> None:
    """Add the tokens, FLOPs and seconds of their step to records of evaluations."""
    by_step = {step["step"]: step for step in steps}
    for record in records:
        known = record.get("flops_per_token") is not None
        start = {"tokens": 0, "flops": 0.0 if known else None, "seconds": 0.0}
        at = start if record["step"] == 0 else by_step.get(record["step"], {})
        record.update({key: at.get(key, record.get(key)) for key in start})


def _missing_steps(folder: Path, steps: list[Record], trunk_step: int) -> list[str]:
    """Return a note of steps that are not on record; those of a missing trunk have their own."""
    has_trunk = steps[0]["step"] <= trunk_step
    first = 1 if has_trunk else trunk_step + 1
    ranges = missing_ranges([record["step"] for record in steps], first, steps[-1]["step"])
    if not ranges:
        return []
    return [
        f"{folder} has no record of {format_ranges(ranges)}: its curves have a gap, its hours are not known"
    ]


def _failures(records: Iterable[Record]) -> list[Failure]:
    """Return the failed evaluations, which training records as "NAME: MESSAGE"."""
    found = [(r["step"], *r["eval_error"].partition(": ")) for r in records if "eval_error" in r]
    return [Failure(step, name, message) for step, name, _, message in found]


def _earlier_results(run: RunRecord) -> list[str]:
    """Return a note for each kind of result that a finished run has of an earlier step alone."""
    kinds = {"held-out losses": run.held_out, "results of tasks": run.tasks}
    return [
        f"{run.folder} has no {kind} of its last step, {run.last_step}; those of step "
        f"{found[-1]['step']} are left out of the results"
        for kind, found in kinds.items()
        if run.is_finished and found and found[-1]["step"] != run.last_step
    ]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Args:
        folder: The folder, from find_runs; one without records makes a run without steps and with a note.

    Raises:
        UserError: Its config is damaged.
    """
    config, records, trunk_step, notes = _read_folder(folder)
    steps = _by_step(records, "loss")
    results, damaged = read_results(folder, _last_fingerprint(records))
    notes += damaged
    held_out, tasks = _by_step(records, "validation_loss"), merge_tasks([*records, *results])
    _add_costs(steps)
    _add_progress(held_out, steps)
    _add_progress(tasks, steps)
    notes += _other_samples(folder, held_out)
    failures = _failures(records)
    notes += [
        f"{folder}: at step {each.step} an evaluation failed: {each.name}: {each.message}"
        for each in failures
    ]
    notes += _missing_steps(folder, steps, trunk_step) if steps else [f"{folder} has no training steps"]
    run = RunRecord(
        folder=folder,
        config=config,
        steps=steps,
        held_out=held_out,
        tasks=tasks,
        diagnostics=_read_diagnostics(folder, config),
        failures=failures,
        num_trunk_steps=trunk_step,
        notes=notes,
    )
    notes += _earlier_results(run)
    if steps and run.last_step is not None and not run.is_finished:
        notes.append(f"{folder} is not finished: step {steps[-1]['step']} of {run.last_step}")
    return run
