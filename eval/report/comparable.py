"""Whether runs may be compared, and what they were made by: code, torch, device."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from data.tokenizer_content import same_tokenizer
from eval.report.run_records import Record, RunRecord

# data keys that do not determine which documents are read
_FREE_DATA_KEYS = ("data.shuffle_seed", "data.shuffle_window", "data.prefetch_batches", "data.tokenizer")


def _compared(run: RunRecord) -> dict[str, Any]:
    """Return the keys that must be equal for losses to be comparable."""
    keys = {k: v for k, v in run.config.items() if k.startswith("data.") and k not in _FREE_DATA_KEYS}
    keys |= {key: run.config[key] for key in ("training.seq_len", "eval.max_tokens") if key in run.config}
    restarts = run.config.get("checkpoint.restart_data", False)
    return keys | {"token budget": run.budget, "checkpoint.restart_data": restarts}


def _num_documents(run: RunRecord) -> dict[str, Any]:
    last = run.tasks[-1] if run.tasks else {}
    held_out = run.held_out[-1] if run.held_out else {}
    return {
        **{key: num for key, num in last.items() if key.endswith(("/num_documents", "/num_fewshot"))},
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


def _difference(key: str, values: Sequence[tuple[RunRecord, Any]]) -> str | None:
    """Say in which two runs a key first differs, of runs and their values; None if all are equal."""
    first, value = values[0]
    differing = next(((run, other) for run, other in values if other != value), None)
    if differing is None:
        return None
    other, its = differing
    text = f"{key} is {value!r} in {first.folder.name} and {its!r} in {other.folder.name}"
    if key.startswith("tasks/"):
        text += f" (from {_origin(first, key)} and {_origin(other, key)})"
    return text


def incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """Find the keys of data, tokenizer and token budget that make runs incomparable.

    The seed of the shuffle may differ. A number of documents, tokens or few-shot examples is compared among
    the runs that recorded one.

    Args:
        runs: Runs with training steps.

    Returns:
        One sentence per key; empty if all runs are comparable.
    """
    facts = [_compared(run) for run in runs]
    counts = [_num_documents(run) for run in runs]
    values: dict[str, list[tuple[RunRecord, Any]]] = {
        key: [(run, each.get(key, "none")) for run, each in zip(runs, facts, strict=True)]
        for key in {key for each in facts for key in each}
    }
    for run, each in zip(runs, counts, strict=True):
        for key, value in each.items():
            values.setdefault(key, []).append((run, value))
    found = {key: _difference(key, of_runs) for key, of_runs in values.items()}
    for table in ("data.train", "data.validation"):
        if found.get(f"{table}.kind"):
            # the other keys of two kinds of source have nothing in common
            found |= {key: None for key in found if key.startswith(f"{table}.") and key != f"{table}.kind"}
    found["data.tokenizer"] = next(
        (text for a, b in combinations(runs, 2) if (text := _tokenizers(a, b)) is not None), None
    )
    return [text for _, text in sorted(found.items()) if text is not None]


def _commit(record: Record) -> str | None:
    commit = record.get("git_commit")
    changes = " with changes" if record.get("git_is_clean") is False else ""
    return None if commit is None else f"{commit[:9]}{changes}"


_MADE_BY: dict[str, Callable[[Record], str | None]] = {
    "commits": _commit,
    "versions of torch": lambda record: record.get("versions", {}).get("torch"),
    "devices": lambda record: record.get("device"),
}


def mixed_origins(runs: Sequence[RunRecord]) -> list[str]:
    """Say where runs were made by several commits, versions of torch or devices.

    They may be compared, but part of their differences may be due to that.

    Args:
        runs: Runs with training steps; the same run may come several times.

    Returns:
        One sentence for each of the three that differs; a run that did not record it does not count.
    """
    sentences = []
    for name, made_by in _MADE_BY.items():
        found: dict[str, list[str]] = {}
        for run in {run.folder: run for run in runs}.values():
            values = dict.fromkeys(value for step in run.steps if (value := made_by(step)) is not None)
            if values:
                found.setdefault(", then ".join(values), []).append(run.folder.name)
        if len(found) > 1:
            parts = (f"{value} ({len(of)} of the runs, such as {of[0]})" for value, of in found.items())
            sentences.append(
                f"The runs are of several {name}, to which part of their differences may be due: "
                f"{', '.join(parts)}."
            )
    return sentences
