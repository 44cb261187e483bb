"""Which config each step of a run was trained with, by the records of its launches in metrics.jsonl.

config.toml is that of the last launch, which may have been killed before its first step.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import Table
from models.run_folder import RunFolder

# keys of [training] that change no step
_STOPS = ("stop_at_step", "stop_at_tokens")
# tables that say how a step is trained and validated
_TABLES = ("optimizer", "schedule", "training", "average", "data", "eval")


class StepConfig(NamedTuple):
    """A config, and the steps that were trained with it.

    Attributes:
        first: The first of the steps.
        last: The last one.
        table: The config as tables, "none" for None.
        source: The file that it is in, for error messages.
    """

    first: int
    last: int
    table: Table
    source: Path

    @property
    def steps(self) -> str:
        """The steps in words."""
        is_from_start = self.first == 1
        return f"the first {self.last} steps" if is_from_start else f"steps {self.first} to {self.last}"


def step_configs(run: RunFolder, step: int) -> list[StepConfig]:
    """Return the configs that the steps up to a checkpoint were trained with.

    Args:
        run: The run folder that has the checkpoint.
        step: Step of the checkpoint.

    Returns:
        The configs in the order of the steps, which they cover without gaps. Steps before the first launch on
        record, of the trunk of a branch for example, count as trained with its config. Without records all
        have that of config.toml; where that is deleted, nothing is compared and the list is empty.

    Raises:
        UserError: config.toml is damaged.
    """
    saved = run.read_config()
    if saved is None:
        return []
    launches: list[tuple[int, Table]] = []
    for start, table in _recorded(run.metrics_file):
        # a launch repeats the later steps of those before
        launches = [each for each in launches if each[0] < start]
        launches.append((start, table))
    launches = [each for each in launches if each[0] < step]
    if not launches:
        return [StepConfig(1, step, saved, run.config_file)]
    found: list[StepConfig] = []
    lasts = [*(start for start, _ in launches[1:]), step]
    for (start, table), last in zip(launches, lasts, strict=True):
        if found and _steps_of(found[-1].table) == _steps_of(table):
            found[-1] = StepConfig(found[-1].first, last, table, run.metrics_file)
        else:
            found.append(StepConfig(start + 1 if found else 1, last, table, run.metrics_file))
    return found


def _recorded(metrics_file: Path) -> Iterator[tuple[int, Table]]:
    """Yield (steps completed before, config) of each launch; those of earlier versions have no config."""
    if not metrics_file.exists():
        return
    with metrics_file.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if '"launch"' not in line:
                continue
            try:
                record = json.loads(line)
                yield int(record["step"]), dict(record["launch"]["config"])
            except (ValueError, KeyError, TypeError):  # a damaged line
                continue


def _steps_of(table: Table) -> dict[str, Any]:
    """Return the part of a config that says how a step is trained."""
    training = {key: value for key, value in table.get("training", {}).items() if key not in _STOPS}
    return {name: table.get(name) for name in _TABLES} | {"training": training}
