"""Whether runs may be compared: the same data, tokenizer, token budget and held-out documents."""

from collections.abc import Sequence
from typing import Any

from data.tokenizer_content import same_tokenizer
from eval.report.run_records import RunRecord

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


def incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """Find the keys of data, tokenizer and token budget that make runs incomparable.

    The seed of the shuffle may differ.

    Args:
        runs: Runs with training steps; each is compared with the first.

    Returns:
        One sentence per key; empty if all runs are comparable.
    """
    found: dict[str, str] = {}
    first, *others = runs
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
