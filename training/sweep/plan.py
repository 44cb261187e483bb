"""The schema of a plan's TOML file: stages of runs that differ in configs, keys and seeds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import config
from errors import MAX_SEED, UserError, check_range
from training.run_config import RunConfig

_MAX_NAME_BYTES = 100
# training/sweep/plan_folder.py: what lies beside the folders of stages
_NAMES_IN_FOLDER = ("configs", "plan.toml", "sweep.lock")


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of nested tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _check_name(key: str, name: str) -> None:
    """Raise unless a name can be that of a folder, or a part of it."""
    is_path = "/" in name or name in ("", ".", "..")
    if is_path or not name.isprintable() or len(name.encode()) > _MAX_NAME_BYTES:
        raise UserError(
            f"{key} must be the name of a folder, of 1 to {_MAX_NAME_BYTES} bytes without slashes or control "
            f"characters, got {name!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values that keys of the config take in turn.

    Attributes:
        keys: Dotted keys. Several keys are tied together: each entry of `values` is then a list with a value
            for each of them.
        values: The values.
        name: Short name, in the names of members and in tables; None for the last part of the first key.
        tuned: Whether the value of lowest held-out loss is chosen for each arm. An arm is what the values of
            all other axes and the config make of a member.
    """

    keys: list[str]
    values: list[Any]
    name: str | None = None
    tuned: bool = False

    def __post_init__(self) -> None:
        if not self.keys or not self.values:
            raise UserError("keys and values of an axis need at least one entry each")
        if len(self.keys) > 1:
            for value in self.values:
                if not isinstance(value, list) or len(value) != len(self.keys):
                    raise UserError(
                        f"values: got {value!r}, want a list of {len(self.keys)} values, one for each of keys"
                    )
        if any(self.values.count(value) > 1 for value in self.values):
            raise UserError(f"values has an entry twice: {self.values}")

        _check_name("name", self.label)

    @property
    def label(self) -> str:
        """The short name."""
        return self.name or self.keys[0].rpartition(".")[2]

    @property
    def is_ordered(self) -> bool:
        """Whether the values are numbers, tied ones by their first: only then does it have ends."""
        firsts = [value[0] if len(self.keys) > 1 else value for value in self.values]
        return all(isinstance(first, int | float) and not isinstance(first, bool) for first in firsts)

    def flat_keys(self) -> list[str]:
        """Return the dotted keys that the values set, those in tables one by one; a tied key each time."""
        return [
            each
            for place, key in enumerate(self.keys)
            for each in {
                name
                for value in self.values
                for name in flatten({key: value[place] if len(self.keys) > 1 else value})
            }
        ]

    def assignments(self, index: int) -> dict[str, Any]:
        """Return key -> value for the value of an index."""
        values = self.values[index] if len(self.keys) > 1 else [self.values[index]]
        return dict(zip(self.keys, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Members that are all combinations of configs, values of axes and seeds.

    Attributes:
        name: Name of the stage, and of its folder in the plan's.
        configs: Config files of runs, relative to the plan's file; empty where the arms are those of
            `best_of`.
        best_of: Earlier stages: their arms, each with the best value of its tuned axes, are the first axis of
            this one. It starts when all members of these stages have finished or failed.
        start_from: An earlier stage: each member is a branch from the last checkpoint of the member there
            that has its config, its seed and, on axes of both, its values. None for runs of their own.
        compare_with: The stage of the arms in `pairs` that those of this one are compared with; None for this
            one.
        set: Keys of the config that all members of the stage share, after those of the plan.
        axes: Further axes.
        seeds: Each is run.seed and, where the config shuffles, data.shuffle_seed.
        priority: Members of stages of a higher priority start first; those of equal priority in the order of
            the file.
        gpu_hours: Members start only while those of the stage are expected to take no more GPU-hours in all;
            None for no limit.
    """

    name: str
    configs: list[str] = field(default_factory=list)
    best_of: list[str] = field(default_factory=list)
    start_from: str | None = None
    compare_with: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    axes: list[Axis] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    priority: int = 0
    gpu_hours: float | None = None

    def __post_init__(self) -> None:
        check_range(self, 0, 1e9, "gpu_hours")
        _check_name("name", self.name)
        if self.name in _NAMES_IN_FOLDER:
            raise UserError(f"name must be none of {', '.join(_NAMES_IN_FOLDER)}, got {self.name!r}")
        if bool(self.configs) == bool(self.best_of):
            raise UserError(
                f"configs is {self.configs} and best_of is {self.best_of}: give one of them, the runs to "
                "vary or the stages whose best is taken"
            )
        if len({*self.configs}) < len(self.configs):
            raise UserError(f"configs must be all different, got {self.configs}")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UserError(f"seeds must be at least one and all different, got {self.seeds}")
        if not all(0 <= seed <= MAX_SEED for seed in self.seeds):
            raise UserError(f"seeds must be at least 0 and at most 2^63 - 1, got {self.seeds}")
        labels = [axis.label for axis in self.axes]
        if len({*labels}) < len(labels):
            raise UserError(f"axes of stage {self.name} are called {labels}: give each a name of its own")
        keys = Counter(key for axis in self.axes for key in axis.flat_keys())
        for key, count in keys.items():
            if count > 1:
                raise UserError(f"axes of stage {self.name} set {key} {count} times: leave it to one of them")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison of many runs.

    Attributes:
        folder: The plan's folder, which has the run folders of all members; by default runs/<name of the
            file>.
        baseline: Name of the arm that the report subtracts from the others; None for no differences.
        pairs: Stem of a config file -> that of the config it is compared with in the report's table of gains:
            members of equal seed, and of equal values where both are of one stage.
        set: Keys of the config that all members share, over those of their config files.
        gpus_per_member: GPUs that each member trains on, by torchrun if there are several.
        members_per_gpu: Members that run on one GPU at a time, and on a machine without GPUs in all. Several
            are faster in total where one is launch-bound; their memory must fit.
        stages: The stages.
    """

    OTHER_NAMES: ClassVar[dict[str, str]] = {
        each.name: f"set.{each.name}: a plan is no run's config" for each in fields(RunConfig)
    }

    folder: str
    baseline: str | None = None
    pairs: dict[str, str] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    gpus_per_member: int = 1
    members_per_gpu: int = 1
    stages: list[Stage]

    def __post_init__(self) -> None:
        check_range(self, 1, 1024, "gpus_per_member", "members_per_gpu")
        seen: list[str] = []
        for stage in self.stages:
            if stage.name in seen:
                raise UserError(f"stages: two of them are called {stage.name!r}")
            for key, names in (
                ("best_of", stage.best_of),
                ("start_from", [stage.start_from]),
                ("compare_with", [stage.compare_with]),
            ):
                for name in names:
                    if name is not None and name not in seen:
                        known = ", ".join(seen) or "none"
                        raise UserError(
                            f"stages: {key} of {stage.name} names {name!r}, want stages before it: {known}"
                        )
            seen.append(stage.name)
        if not seen:
            raise UserError("stages: a plan needs at least one [[stages]]")

    @staticmethod
    def name_after_file(table: dict[str, Any], path: Path) -> None:
        """Set the default of folder, in place: runs/<stem of the plan's file>."""
        table.setdefault("folder", f"runs/{path.stem}")


class PlanSource:
    """Where the keys of a plan were set, for error messages.

    Args:
        file: The plan's file.
        overrides: Words of the command line such as "--set.training.steps=100".

    Attributes:
        file: The plan's file.
    """

    def __init__(self, file: Path, overrides: Sequence[str] = ()) -> None:
        self.file = file
        self._overridden: dict[str, tuple[str, Any]] = {}  # dotted key -> option, value
        for word in overrides:
            option, _, text = word.partition("=")
            for key, value in flatten({option.removeprefix("--"): config.parse_value(text)}).items():
                self._overridden[key] = f"command line, {option}", value

    def of(self, key: str) -> str:
        """Return the option that sets a key of the plan, else the file."""
        return self._overridden.get(key, (str(self.file), None))[0]

    def options(self, assignments: Mapping[str, Any]) -> dict[str, str]:
        """Return key -> option of those assignments of a member that an option of the plan's `set` makes.

        Args:
            assignments: Dotted key of the config -> value.
        """
        return {
            key: found[0]
            for key, value in assignments.items()
            if (found := self._overridden.get(f"set.{key}")) is not None and found[1] == value
        }


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a plan.

    Args:
        path: The TOML file.
        overrides: Words such as "--set.data.tokenizer=X": keys of the plan.

    Raises:
        UserError: Names the file or the command line, the key, what was got and what is allowed.
    """
    return config.load(Plan, path, overrides)
