"""Choices of a run: its config without names, folders, seeds and what follows from other keys."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import config
from models.config import AttentionConfig, ModelConfig
from models.sizes import split_size
from optimizers.config import UNREAD_KEYS, GroupSchedule, ParameterGroup, ScheduleConfig

Config = Mapping[str, Any]
"""A resolved config: dotted key -> value; keys that are "none" are left out."""

SEED_KEYS = ("run.seed", "data.shuffle_seed")
NO_KEY = "-"
"""The value of a key that a run's kind of attention or optimizer does not have."""

# names, folders, and what changes how a run is computed, watched or measured, and not what is computed
_FREE_PREFIXES = (
    *("run.", "checkpoint.", "metrics.", "parallelism."),
    *("eval.", "average.", "diagnostics."),
)
_FREE_KEYS = (
    *(*SEED_KEYS, "data.prefetch_batches", "data.tokenizer", "model.attention.impl"),
    *("training.stop_at_step", "training.stop_at_tokens"),
    *("training.local_batch_size", "training.compile", "training.cuda_graphs"),
    "training.activation_checkpointing",
)
_START_KEYS = ("checkpoint.start_from", "checkpoint.restart_data", "checkpoint.initial_weights")


@cache
def _schemas(table: str) -> dict[str | None, type]:
    """Return the dataclasses of a table by kind, or the only one under None; none if it is not known."""
    if table == "model":
        return {None: ModelConfig}
    if table == "schedule":
        return {None: ScheduleConfig}
    if table.startswith("optimizer.groups.") and table.endswith(".schedule"):
        return {None: GroupSchedule}
    hint = AttentionConfig if table == "model.attention" else None
    hint = ParameterGroup if table.startswith("optimizer.groups.") else hint
    return {} if hint is None else {config.kind_of(each): each for each in config.variants(hint)}


def _schema(run: Config, table: str) -> type | None:
    schemas = _schemas(table)
    return schemas.get(run.get(f"{table}.kind"), schemas.get(None))


def has_key(run: Config, key: str) -> bool:
    """Return whether a run's kind of attention, optimizer or schedule has a key; True if it is not known."""
    table, _, name = key.rpartition(".")
    if name == "kind" or not _schemas(table):
        return True
    schema = _schema(run, table)
    if schema is None:
        return key in run
    if schema in (ScheduleConfig, GroupSchedule) and name in UNREAD_KEYS.get(_schedule_kind(run, table), ()):
        return False
    return name in {field.name for field in dataclasses.fields(schema)}


def _schedule_kind(run: Config, table: str) -> Any:
    """Return the kind of a schedule: that of a group without one is the run's."""
    return run.get(f"{table}.kind") or run.get("schedule.kind", ScheduleConfig.kind)


def _default(run: Config, key: str) -> Any:
    """Return the default of a key; dataclasses.MISSING where it has none, or it is not known."""
    table, _, name = key.rpartition(".")
    schema = _schema(run, table)
    found = {} if schema is None else {field.name: field.default for field in dataclasses.fields(schema)}
    return found.get(name, dataclasses.MISSING)


def is_default(run: Config, key: str) -> bool:
    """Return whether a run has the default of a key, or leaves it out."""
    return key not in run or run[key] == _default(run, key)


def is_free(key: str) -> bool:
    """Return whether runs that differ in a key compute the same, up to seeds and rounding."""
    return key not in _START_KEYS and (key in _FREE_KEYS or key.startswith(_FREE_PREFIXES))


def choices(run: Config) -> dict[str, Any]:
    """Return the keys of a run that were chosen.

    Args:
        run: The resolved config.

    Returns:
        Dotted key -> value, without free keys and defaults. `kind` is always in it. The size of a baseline
        that is named after its attention is that of its softmax model; the checkpoint that a branch starts
        from is its name step-N, as the seeds of a branch start from different trunks.
    """
    kept = {
        key: value
        for key, value in run.items()
        if not is_free(key) and (key.endswith(".kind") or not is_default(run, key))
    }
    if kept.get("checkpoint.start_from"):
        kept["checkpoint.start_from"] = Path(kept["checkpoint.start_from"]).name
    else:
        kept.pop("checkpoint.restart_data", None)
    if not kept.get("checkpoint.restart_data", True):
        del kept["checkpoint.restart_data"]
    size, control = split_size(run.get("model.size", ""))
    if control is not None and control == run.get("model.attention.kind"):
        kept["model.size"] = size
    return kept


def differing_choices(runs: Sequence[Config]) -> dict[str, list[Any]]:
    """Return the choices in which runs differ.

    A key that the kind of some runs lacks is compared among the others; where they agree, it is listed only
    if they give it another value than its default, as otherwise it follows from the kind.

    Args:
        runs: Resolved configs.

    Returns:
        Dotted key -> value for each run: its default where the config does not give it, NO_KEY where its kind
        does not have it. Keys of the model come first, then those of optimizers.
    """
    chosen = [choices(run) for run in runs]
    found = {}
    for key in sorted({key for each in chosen for key in each}, key=_order):
        values = [_value(run, each, key) for run, each in zip(runs, chosen, strict=True)]
        having = [value for value in values if value != NO_KEY]
        differs = any(value != having[0] for value in having)
        is_optional = any(_default(run, key) is not dataclasses.MISSING for run in runs)
        if differs or (len(having) < len(runs) and is_optional):
            found[key] = values
    return found


def _value(run: Config, chosen: Mapping[str, Any], key: str) -> Any:
    if not has_key(run, key):
        return NO_KEY
    value = chosen.get(key, _default(run, key))
    return "none" if value in (None, dataclasses.MISSING) else value


def _order(key: str) -> tuple[int, bool, str]:
    tables = ("model.attention.kind", "model.", "optimizer.groups.hidden.kind", "optimizer.", "schedule.")
    rank = next((index for index, start in enumerate(tables) if key.startswith(start)), len(tables))
    return rank, not key.endswith(".kind"), key


def is_rate(key: str) -> bool:
    """Return whether a key is the learning rate of a parameter group."""
    return key.startswith("optimizer.groups.") and key.endswith(".lr")


def hidden_optimizer(run: Config) -> str:
    """Return the kind of the hidden matrices' optimizer; "mixed" if some of them have Muon, others AdamW."""
    start = "optimizer.groups."
    kinds = {key: value for key, value in run.items() if key.startswith(start) and key.endswith(".kind")}
    hidden = kinds.pop(f"{start}hidden.kind", "")
    return "mixed" if hidden == "adamw" and "muon" in kinds.values() else hidden
