"""Runs as rows of a comparison: seeds of one row, differences with their errors, and what may be compared."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.paper_numbers import PaperRow, paper_row
from eval.report.run_records import RunRecord

# what seeds of one row may differ in: the seeds, the names, and what leaves the computation as it is
_SEED_KEYS = ("run.seed", "data.shuffle_seed")
_FREE_PREFIXES = ("run.name", "run.folder", "checkpoint.", "metrics.", "parallelism.", "eval.")
_FREE_KEYS = (*_SEED_KEYS, "data.prefetch_batches", "model.attention.impl", "training.stop_at_step")
# data keys that leave open which documents are read
_FREE_DATA_KEYS = ("data.shuffle_seed", "data.prefetch_batches", "data.tokenizer")
FINAL_STEPS = 20
"""Steps over which the final training loss is averaged."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Its standard error s / sqrt(n), s with n - 1 degrees of freedom; None with one seed.
        num_seeds: Seeds n that have a value.
    """

    mean: float
    error: float | None
    num_seeds: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error of one value a seed; None without values."""
    if not values:
        return None
    num = len(values)
    error = statistics.stdev(values) / math.sqrt(num) if num > 1 else None
    return Estimate(mean=statistics.fmean(values), error=error, num_seeds=num)


def difference(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    """The estimate a - b of independent seeds: errors add in squares; no error where one of them has none."""
    if a is None or b is None:
        return None
    known = a.error is not None and b.error is not None
    error = math.hypot(a.error or 0.0, b.error or 0.0) if known else None
    return Estimate(mean=a.mean - b.mean, error=error, num_seeds=min(a.num_seeds, b.num_seeds))


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ in their seeds alone.

    Attributes:
        name: Name of the first one's folder.
        runs: The runs, at least one, each with training steps.
    """

    name: str
    runs: list[RunRecord]

    @property
    def paper(self) -> PaperRow | None:
        """The paper's row of the same model and optimizer."""
        return paper_row(self.runs[0].config)

    def over_seeds(self, value: Callable[[RunRecord], float | None]) -> Estimate | None:
        """A value of each run as an estimate; runs without one are left out."""
        found = [x for x in (value(run) for run in self.runs) if x is not None]
        return estimate(found)


def training_loss(run: RunRecord) -> float | None:
    """Mean loss of the last FINAL_STEPS steps in nats/token; None for a run that has not finished."""
    return statistics.fmean(s["loss"] for s in run.steps[-FINAL_STEPS:]) if run.is_finished else None


def held_out_loss(run: RunRecord) -> float | None:
    """The held-out loss after the last step in nats/token; None where there is none yet."""
    if not run.held_out or run.held_out[-1]["step"] != run.last_step:
        return None
    return run.held_out[-1]["validation_loss"]


def task_metric(run: RunRecord, task: str, metric: str) -> float | None:
    """A task's metric after the last step; None where there is none.

    Args:
        run: The run.
        task: The task's name, as "lambada_openai"; "" for what is no task's, as mean_accuracy.
        metric: The metric's name.
    """
    if not run.tasks or run.tasks[-1]["step"] != run.last_step:
        return None
    return run.tasks[-1].get(f"tasks/{task}/{metric}" if task else f"tasks/{metric}")


def _row_key(run: RunRecord) -> str:
    kept = {k: v for k, v in run.config.items() if not k.startswith(_FREE_PREFIXES) and k not in _FREE_KEYS}
    start, weights = (run.config.get(f"checkpoint.{key}") for key in ("start_from", "initial_weights"))
    # seeds of a branch start from trunks of their own, at the same step
    return repr((sorted(kept.items()), run.budget, start and Path(start).name, weights))


def make_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Group runs whose configs differ in seeds, names and what leaves the computation as it is.

    Args:
        runs: Runs with training steps, in the order of the report.

    Returns:
        Rows in the order of their first runs. The same run with the same seeds again is a row of its own: it
        says nothing about an error.
    """
    groups: dict[str, list[RunRecord]] = {}
    seen: set[str] = set()
    for run in runs:
        key = _row_key(run)
        seeds = [run.config.get(name) for name in _SEED_KEYS]
        if f"{key} {seeds}" in seen:
            key = str(run.folder)
        seen.add(f"{key} {seeds}")
        groups.setdefault(key, []).append(run)
    names = [members[0].folder.name for members in groups.values()]
    return [
        Row(name=name if names.count(name) == 1 else str(members[0].folder), runs=members)
        for name, members in zip(names, groups.values(), strict=True)
    ]


def find_row(rows: Sequence[Row], name: str) -> Row:
    """The row that has a run of that name or folder.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = [
        row
        for row in rows
        if name in (row.name, *(n for r in row.runs for n in (r.folder.name, r.config.get("run.name"))))
        or any(name.rstrip("/") == str(run.folder) for run in row.runs)
    ]
    if len(found) != 1:
        there = ", ".join(row.name for row in rows)
        problem = "is none of the rows" if not found else "names more than one row"
        raise ValueError(f"--baseline {name!r} {problem}; rows: {there}")
    return found[0]


def _compared(run: RunRecord) -> dict[str, Any]:
    """What two runs must share for their losses to be comparable."""
    keys = {k: v for k, v in run.config.items() if k.startswith("data.") and k not in _FREE_DATA_KEYS}
    keys |= {key: run.config[key] for key in ("training.seq_len", "eval.max_tokens") if key in run.config}
    return keys | {"tokens of the run": run.budget}


def _num_documents(run: RunRecord) -> dict[str, Any]:
    last = run.tasks[-1] if run.tasks else {}
    return {key: value for key, value in last.items() if key.endswith("/num_documents")}


def _origin(run: RunRecord, key: str) -> str:
    """Where a run's "tasks/<task>/num_documents" comes from."""
    path = run.tasks[-1]["origins"].get(key.split("/")[1])
    return "training" if path is None else path


def _tokenizers(a: RunRecord, b: RunRecord) -> str | None:
    """How two tokenizers differ: by their vocabularies where both runs recorded them, else by their paths."""
    prints = [run.steps[-1].get("tokenizer_fingerprint") for run in (a, b)]
    paths = [run.config.get("data.tokenizer") for run in (a, b)]
    same = prints[0] == prints[1] if None not in prints else paths[0] == paths[1]
    if same:
        return None
    first, second = (f"{p!r} ({f or 'not recorded'})" for p, f in zip(paths, prints, strict=True))
    return f"data.tokenizer is {first} in {a.folder.name} and {second} in {b.folder.name}"


def incomparable(rows: Sequence[Row]) -> list[str]:
    """What keeps runs from being compared: data, tokenizer, token budget; one sentence a key.

    Args:
        rows: The rows; each of their runs is compared with the first.

    Returns:
        Empty where all may be compared. Seeds of the order may differ.
    """
    found: dict[str, str] = {}
    first, *others = (run for row in rows for run in row.runs)
    for other in others:
        documents = _num_documents(first), _num_documents(other)
        shared = documents[0].keys() & documents[1].keys()
        one, two = (
            _compared(run) | {key: found[key] for key in shared}
            for run, found in zip((first, other), documents, strict=True)
        )
        for key in sorted({*one} | {*two}):
            a, b = one.get(key, "none"), two.get(key, "none")
            if a != b:
                text = f"{key} is {a!r} in {first.folder.name} and {b!r} in {other.folder.name}"
                if key in shared:
                    text += f" (from {_origin(first, key)} and {_origin(other, key)})"
                found.setdefault(key, text)
        text = _tokenizers(first, other)
        if text is not None:
            found.setdefault("data.tokenizer", text)
    return [found[key] for key in sorted(found)]


def differing_keys(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Config keys in which rows differ, one value a row ("none" where a row lacks it); seeds left out."""
    configs = [row.runs[0].config for row in rows]
    keys = sorted({key for config in configs for key in config})
    starts = ("checkpoint.start_from", "checkpoint.initial_weights")
    free = ("run.", "checkpoint.", "metrics.", "parallelism.")
    values = {
        key: [config.get(key, "none") for config in configs]
        for key in keys
        if key in starts or not (key.startswith(free) or key in _SEED_KEYS)
    }
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}
