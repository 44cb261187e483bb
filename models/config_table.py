"""Configs as plain tables and as TOML."""

import dataclasses
import json
import re
from typing import Any

Table = dict[str, Any]


def to_table(config: Any) -> Any:
    """A config as nested dicts of TOML values; None becomes "none"."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_table(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_table(value) for key, value in config.items()}
    if isinstance(config, list):
        return [to_table(value) for value in config]
    return "none" if config is None else config


def _value(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists are TOML's, but for its escapes of characters beyond 16 bits
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def to_toml(config: Any) -> str:
    """A config as TOML, or a dict of them by table; loaded again it gives an equal one."""
    lines: list[str] = []

    def write(table: Table, name: str) -> None:
        scalars = {k: v for k, v in table.items() if not isinstance(v, dict)}
        if scalars and name:
            lines.append(f"\n[{name}]")
        lines.extend(f"{_key(key)} = {_value(value)}" for key, value in scalars.items())
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, f"{name}.{_key(key)}" if name else _key(key))

    write(to_table(config), "")
    return "\n".join(lines).lstrip() + "\n"
