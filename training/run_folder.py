"""The run folder: the resolved config beside the checkpoints, and what may change between two launches."""

import os
import tomllib
from pathlib import Path
from typing import Any

from training.config_table import to_table, to_toml
from training.run_config import RunConfig


def _differences(saved: Any, now: Any, key: str) -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for name in sorted({*saved, *now})
            for line in _differences(saved.get(name), now.get(name), f"{key}.{name}")
        ]
    return [] if saved == now else [f"{key} is {saved!r} there and {now!r} here"]


def check_architecture(run: RunConfig) -> None:
    """Refuse to continue a run folder with another model.

    Raises:
        ValueError: The folder has checkpoints of another [model]; names the keys that differ.
    """
    folder = Path(run.run.folder)
    saved = folder / "config.toml"
    if not saved.exists() or not any((folder / "checkpoint").glob("step-*")):
        return
    table = tomllib.loads(saved.read_text(encoding="utf-8"))
    differences = _differences(table.get("model"), to_table(run.model), "model")
    if differences:
        raise ValueError(
            f"{folder} holds checkpoints of another architecture: {'; '.join(differences)}. "
            "Give this run another run.folder, or restore the model's keys"
        )


def write_config(run: RunConfig) -> None:
    """Write <run.folder>/config.toml, whole or not at all."""
    folder = Path(run.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "config.toml.tmp"
    temporary.write_text(to_toml(run), encoding="utf-8")
    os.replace(temporary, folder / "config.toml")
