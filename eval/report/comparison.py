"""Comparison of runs: rows of seeds, means and differences with standard errors, and whether to compare."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer_content import same_tokenizer
from errors import UserError
from eval.report.paper_numbers import PaperRow, paper_row
from eval.report.run_records import RunRecord

# keys in which the seeds of one row may differ: seeds, names, and keys that do not change the computation
_SEED_KEYS = ("run.seed", "data.shuffle_seed")
_FREE_PREFIXES = ("run.name", "run.folder", "checkpoint.", "metrics.", "parallelism.", "eval.", "average.")
_FREE_KEYS = (
    *(*_SEED_KEYS, "data.prefetch_batches", "model.attention.impl"),
    *("training.stop_at_step", "training.stop_at_tokens"),
)
# data keys that do not determine which documents are read
_FREE_DATA_KEYS = ("data.shuffle_seed", "data.shuffle_window", "data.prefetch_batches", "data.tokenizer")
FINAL_STEPS = 20
"""Steps over which the final training loss is averaged."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        error: Standard error s / sqrt(n), with the sample standard deviation s; None for one seed.
        num_seeds: Number n of seeds with a value.
    """

    mean: float
    error: float | None
    num_seeds: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Estimate the mean of a value per seed, with its standard error; None without values."""
    if not values:
        return None
    num = len(values)
    error = statistics.stdev(values) / math.sqrt(num) if num > 1 else None
    return Estimate(mean=statistics.fmean(values), error=error, num_seeds=num)


def difference(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    """Estimate a - b over independent seeds: variances add; no error where one of them has none."""
    if a is None or b is None:
        return None
    known = a.error is not None and b.error is not None
    error = math.hypot(a.error or 0.0, b.error or 0.0) if known else None
    return Estimate(mean=a.mean - b.mean, error=error, num_seeds=min(a.num_seeds, b.num_seeds))


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ only in their seeds.

    Attributes:
        name: Name of the first run's folder.
        runs: The runs, at least one, all with training steps.
    """

    name: str
    runs: list[RunRecord]

    @property
    def paper(self) -> PaperRow | None:
        """The paper's row of the same model and optimizer; None without one."""
        return paper_row(self.runs[0].config)

    def over_seeds(self, value: Callable[[RunRecord], float | None]) -> Estimate | None:
        """Estimate the mean of a value over the runs that have one; None where none has."""
        found = [x for x in (value(run) for run in self.runs) if x is not None]
        return estimate(found)


def training_loss(run: RunRecord) -> float | None:
    """Return the mean loss of the last FINAL_STEPS steps in nats/token; None for an unfinished run."""
    return statistics.fmean(s["loss"] for s in run.steps[-FINAL_STEPS:]) if run.is_finished else None


def held_out_loss(run: RunRecord) -> float | None:
    """Return the held-out loss after the last step in nats/token; None where there is none yet."""
    if not run.held_out or run.held_out[-1]["step"] != run.last_step:
        return None
    return run.held_out[-1]["validation_loss"]


def held_out_error(run: RunRecord) -> float | None:
    """Return the standard error over documents of held_out_loss in nats/token; None where there is none."""
    return None if held_out_loss(run) is None else run.held_out[-1].get("validation_stderr")


def task_metric(run: RunRecord, task: str, metric: str) -> float | None:
    """Return a task's metric after the last step; None where there is none.

    Args:
        run: The run.
        task: The task's name, such as "lambada_openai"; "" for a metric over tasks, such as mean_accuracy.
        metric: The metric's name.
    """
    if not run.tasks or run.tasks[-1]["step"] != run.last_step:
        return None
    return run.tasks[-1].get(f"tasks/{task}/{metric}" if task else f"tasks/{metric}")


def _row_key(run: RunRecord) -> str:
    kept = {k: v for k, v in run.config.items() if not k.startswith(_FREE_PREFIXES) and k not in _FREE_KEYS}
    start, weights = (run.config.get(f"checkpoint.{key}") for key in ("start_from", "initial_weights"))
    # the seeds of a branch start from different trunks, at the same step
    origin = start and (Path(start).name, _restarts_data(run))
    return repr((sorted(kept.items()), run.budget, origin, weights))


def _restarts_data(run: RunRecord) -> bool:
    """Return whether a run read its data from the beginning after a trunk that may have read other data."""
    return run.config.get("checkpoint.restart_data", False)


def make_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Group runs whose configs differ only in seeds, names and keys that do not change the computation.

    Args:
        runs: Runs with training steps, in the order of the report.

    Returns:
        Rows in the order of their first runs. A second run of the same seeds is a row of its own, as it is no
        independent sample.
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
    """Find the row of the run with a name or folder.

    Raises:
        UserError: There is none, or more than one.
    """
    found = [
        row
        for row in rows
        if name in (row.name, *(n for r in row.runs for n in (r.folder.name, r.config.get("run.name"))))
        or any(name.rstrip("/") == str(run.folder) for run in row.runs)
    ]
    if len(found) != 1:
        known = ", ".join(row.name for row in rows)
        problem = "is not a row" if not found else "names several rows"
        raise UserError(f"--baseline {name!r} {problem}; rows: {known}")
    return found[0]


def _compared(run: RunRecord) -> dict[str, Any]:
    """Return the keys that must be equal for losses to be comparable."""
    keys = {k: v for k, v in run.config.items() if k.startswith("data.") and k not in _FREE_DATA_KEYS}
    keys |= {key: run.config[key] for key in ("training.seq_len", "eval.max_tokens") if key in run.config}
    return keys | {"token budget": run.budget, "checkpoint.restart_data": _restarts_data(run)}


def _num_documents(run: RunRecord) -> dict[str, Any]:
    last = run.tasks[-1] if run.tasks else {}
    held_out = run.held_out[-1] if run.held_out else {}
    return {
        **{key: value for key, value in last.items() if key.endswith("/num_documents")},
        **{key: held_out[key] for key in ("validation_documents", "validation_tokens") if key in held_out},
    }


def _origin(run: RunRecord, key: str) -> str:
    """Return the file that a run's "tasks/<task>/num_documents" comes from, or "training"."""
    path = run.tasks[-1]["origins"].get(key.split("/")[1])
    return "training" if path is None else path


def _tokenizers(a: RunRecord, b: RunRecord) -> str | None:
    """Compare tokenizers: by fingerprint where both runs recorded one, else by path; None if equal."""
    fingerprints = one, other = [run.steps[-1].get("tokenizer_fingerprint") for run in (a, b)]
    paths = [run.config.get("data.tokenizer") for run in (a, b)]
    if paths[0] == paths[1] if one is None or other is None else same_tokenizer(one, other):
        return None
    first, second = (f"{p!r} ({f or 'not recorded'})" for p, f in zip(paths, fingerprints, strict=True))
    return f"data.tokenizer is {first} in {a.folder.name} and {second} in {b.folder.name}"


def incomparable(rows: Sequence[Row]) -> list[str]:
    """Find the keys of data, tokenizer and token budget that make runs incomparable.

    The seed of the shuffle may differ.

    Args:
        rows: The rows; each of their runs is compared with the first.

    Returns:
        One sentence per key; empty if all runs are comparable.
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
                if key in shared and key.startswith("tasks/"):
                    text += f" (from {_origin(first, key)} and {_origin(other, key)})"
                found.setdefault(key, text)
        text = _tokenizers(first, other)
        if text is not None:
            found.setdefault("data.tokenizer", text)
    return [found[key] for key in sorted(found)]


def differing_keys(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return the config keys in which rows differ, seeds excepted: one value per row, "none" where unset."""
    configs = [row.runs[0].config for row in rows]
    keys = sorted({key for config in configs for key in config})
    starts = ("checkpoint.start_from", "checkpoint.restart_data", "checkpoint.initial_weights")
    free = ("run.", "checkpoint.", "metrics.", "parallelism.")
    values = {
        key: [config.get(key, "none") for config in configs]
        for key in keys
        if key in starts or not (key.startswith(free) or key in _SEED_KEYS)
    }
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}
