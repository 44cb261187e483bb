"""A run as plain tables and as TOML."""

import dataclasses
import json
from typing import Any

from training.run_config import RunConfig

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


def to_toml(config: RunConfig) -> str:
    """The resolved run as TOML; loaded again it gives an equal RunConfig."""
    lines: list[str] = []

    def write(table: Table, name: str) -> None:
        scalars = {k: v for k, v in table.items() if not isinstance(v, dict)}
        if scalars and name:
            lines.append(f"\n[{name}]")
        # JSON's strings, numbers, booleans and lists are TOML's
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in scalars.items())
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, f"{name}.{key}" if name else key)

    write(to_table(config), "")
    return "\n".join(lines).lstrip() + "\n"
