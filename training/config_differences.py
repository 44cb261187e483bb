"""Describe how the config of a launch differs from a saved one, key by key; without importing torch.

Saved configs are tables as in TOML, where "none" stands for None. A config saved by an earlier version of the
code lacks the keys introduced since.
"""

import json
from collections.abc import Iterable
from typing import Any

from config import Table, to_table
from training.free_keys import is_free
from training.run_config import RunConfig

KeyPath = tuple[str, ...]


def config_differences(config: RunConfig, saved: Table) -> list[str]:
    """Describe all keys that differ, but for run.folder, whose path may be written in other ways."""
    current = to_table(config)
    run = {**current["run"], "folder": saved.get("run", {}).get("folder")}
    return [
        line
        for name, table in (current | {"run": run}).items()
        for line in differences(saved.get(name), table, name, skip_missing=True)
    ]


def training_changes(differing: Iterable[str]) -> list[str]:
    """Return those of config_differences that change what is trained."""
    return [each for each in differing if not is_free(each.partition(":")[0])]


def differences(
    saved: Any, current: Any, key: str, *, ignored: tuple[str, ...] = (), skip_missing: bool = False
) -> list[str]:
    """Describe the values that differ, table by table.

    Args:
        saved: Saved value; None for a missing key.
        current: Value of this launch; None for a missing key.
        key: Dotted key of both.
        ignored: Keys that may differ, in any table.
        skip_missing: Whether to skip the keys that are missing in saved.
    """
    if isinstance(saved, dict) and isinstance(current, dict):
        kind = saved.get("kind", current.get("kind"))
        if kind != current.get("kind"):
            return [describe_difference(f"{key}.kind", kind, current.get("kind"))]
        return [
            line
            for name in sorted({*saved, *current} - {*ignored})
            for line in differences(
                saved.get(name),
                current.get(name),
                f"{key}.{name}",
                ignored=ignored,
                skip_missing=skip_missing,
            )
        ]
    if saved == current or (saved is None and skip_missing):
        return []
    return [describe_difference(key, saved, current)]


def differences_at(config: RunConfig, saved: Table, keys: Iterable[KeyPath]) -> list[str]:
    """Describe the keys that differ, among some; skips those that are missing in the saved config."""
    current = to_table(config)
    return [
        line
        for key in keys
        for line in differences(_at(saved, key), _at(current, key), ".".join(key), skip_missing=True)
    ]


def describe_difference(key: str, saved: Any, current: Any) -> str:
    """Return "KEY: saved VALUE, now VALUE", with the values as in TOML; None is a missing key."""
    return f"{key}: saved {_to_toml(saved)}, now {_to_toml(current)}"


def _to_toml(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_to_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _at(table: Any, key: KeyPath) -> Any:
    for part in key:
        table = table.get(part) if isinstance(table, dict) else None
    return table
