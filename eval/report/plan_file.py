"""plan.toml in a plan's folder: its members, arms and choices, as the sweep resolved them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import from_table, read_toml, to_toml
from disk import write_text
from models.run_folder import RunFolder

_NAME = "plan.toml"


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A member of a plan.

    Attributes:
        number: Number of the member in the plan, from 0.
        run: Path of its run folder in the plan's folder; None while what it takes from an earlier stage is
            not chosen. Members of two stages that are the same run share it.
        compared_with: Path of the run of equal seed that it is compared with in the table of gains; None for
            none.
        config: Name of its config file, without the ending.
        arm: Its arm: what it is apart from tuned values and seed.
        values: Short name of an axis -> its value.
        seed: Its seed.
    """

    number: int
    run: str | None = None
    compared_with: str | None = None
    config: str
    arm: str
    values: dict[str, Any] = field(default_factory=dict)
    seed: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best of an arm's tuned values.

    Attributes:
        arm: The arm.
        values: Short name of a tuned axis -> its best value.
        loss: Held-out loss there after the last step, mean over seeds, in nats/token.
        warning: Where the best lies at an end of an axis, or some values have no loss; None if neither.
    """

    arm: str
    values: dict[str, Any]
    loss: float
    warning: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage of a plan.

    Attributes:
        name: Its name.
        members: Its members.
        choices: The best values of its tuned axes, by arm, once all members have ended.
    """

    name: str
    members: list[PlannedRun]
    choices: list[Choice] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """What is known of a plan in its folder.

    Attributes:
        baseline: Name of the arm that is subtracted from the others; None for no differences.
        stages: The stages.
    """

    baseline: str | None = None
    stages: list[PlannedStage]

    def write(self, folder: Path) -> None:
        """Write the file into the plan's folder, atomically, unless it is there."""
        text, path = to_toml(self), folder / _NAME
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, text)


def is_plan(folder: Path) -> bool:
    """Return whether a folder is a plan's."""
    return (folder / _NAME).is_file() and not RunFolder(folder).config_file.exists()


def read_plan(folder: Path) -> PlanFile:
    """Read the file in a plan's folder.

    Raises:
        UserError: It is missing or damaged.
    """
    path = folder / _NAME
    return from_table(PlanFile, read_toml(path), path)
