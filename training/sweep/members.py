"""The members of a plan: one run for each combination of a stage's configs, values and seeds."""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import config
from errors import ConfigError, UserError
from models.run_folder import RunFolder
from training.run_config import RunConfig
from training.sweep.plan import Axis, Plan, PlanSource, Stage, flatten

_LONGEST = 24  # characters of a value in a name
_OWN_KEYS = {
    "run.name": "the sweep names its members",
    "run.folder": "all members are in the plan's folder",
    "run.seed": "set seeds of the stage",
    "data.shuffle_seed": "set seeds of the stage",
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A member of a stage, but for its seed.

    Attributes:
        config_file: The run that is varied.
        arm: Name of the arm.
        name: Name with the tuned values.
        assignments: Dotted key -> value, over those of the file.
        values: Short name of an axis -> value, for tables.
        tuned: Indices of the values of the stage's tuned axes.
    """

    config_file: Path
    arm: str
    name: str
    assignments: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    tuned: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Member:
    """A member of a plan.

    Attributes:
        number: Its number in the plan, from 0; it does not depend on what is chosen.
        stage: Name of its stage.
        path: Path of its run folder in the plan's folder: the one of the same run in an earlier stage, if
            there is one.
        variant: What it is but for its seed.
        seed: Its seed.
        config: The resolved config; with values that stand in for the best while that is not chosen.
        is_known: Whether what it takes from earlier stages is chosen.
        same_as: Number of the member of an earlier stage that is the same run; None for a run of its own.
        trunk: The member that it is a branch of; None for a run from the first step.
    """

    number: int
    stage: str
    path: str
    variant: Variant
    seed: int
    config: RunConfig
    is_known: bool = True
    same_as: int | None = None
    trunk: "Member | None" = None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that it starts from."""
        start_from = self.config.checkpoint.start_from
        return None if start_from is None else Path(start_from)

    @property
    def run_number(self) -> int:
        """Number of the member whose run it is: its own, or that of the same run in an earlier stage."""
        return self.number if self.same_as is None else self.same_as


Chosen = Mapping[tuple[str, str], Variant]
"""(stage, arm) -> the variant of the best tuned values; arms without one are left out."""


def stage_members(
    plan: Plan, stage: Stage, source: PlanSource, earlier: Sequence[Member], chosen: Chosen
) -> list[Member]:
    """Make the members of a stage.

    Args:
        plan: The plan.
        stage: One of its stages.
        source: Where its keys were set; the paths of configs are relative to its file.
        earlier: The members of the stages before.
        chosen: The best variants of these.

    Raises:
        UserError: A config is missing or does not allow a value; two members have one name.
    """
    members: list[Member] = []
    known = {_identity(each.config): each for each in reversed(earlier) if each.is_known}
    variants = _variants(plan, stage, source, earlier, chosen)
    for (variant, is_known), seed in itertools.product(variants, stage.seeds):
        path = f"{stage.name}/{variant.name}_seed{seed}"
        trunk = _trunk(stage, variant, seed, earlier)
        run = _load(plan, stage, source, variant, seed, path)
        member = Member(
            number=len(earlier) + len(members),
            stage=stage.name,
            path=path,
            variant=variant,
            seed=seed,
            config=run if trunk is None else _branch(plan, run, trunk),
            is_known=is_known and (trunk is None or trunk.is_known),
            trunk=trunk,
        )
        same = known.get(_identity(member.config)) if is_known else None
        if same is not None:
            member = replace(member, path=same.path, config=same.config, same_as=same.number)
        members.append(member)
    _check_names(stage, members)
    return members


def _variants(
    plan: Plan, stage: Stage, source: PlanSource, earlier: Sequence[Member], chosen: Chosen
) -> Iterable[tuple[Variant, bool]]:
    """Yield each variant, and whether what it takes from earlier stages is chosen."""
    for first, is_known in _firsts(plan, stage, source, earlier, chosen):
        for indices in itertools.product(*(range(len(axis.values)) for axis in stage.axes)):
            variant = replace(first, assignments=first.assignments | flatten(stage.set))
            for axis, index in zip(stage.axes, indices, strict=True):
                variant = _vary(variant, axis, index)
            yield variant, is_known


def _firsts(
    plan: Plan, stage: Stage, source: PlanSource, earlier: Sequence[Member], chosen: Chosen
) -> Iterable[tuple[Variant, bool]]:
    for file in stage.configs:
        path, shared = source.file.parent / file, flatten(plan.set)
        yield Variant(config_file=path, arm=path.stem, name=path.stem, assignments=shared), True
    firsts: dict[tuple[str, str], Member] = {}
    for member in earlier:
        if member.stage in stage.best_of:
            firsts.setdefault((member.stage, member.variant.arm), member)
    for (name, arm), member in firsts.items():
        best = chosen.get((name, arm))
        unknown = replace(member.variant, name=f"{arm}_best", tuned=())
        yield (unknown, False) if best is None else (replace(best, tuned=()), True)


def _vary(variant: Variant, axis: Axis, index: int) -> Variant:
    value = axis.values[index]
    part = f"_{axis.label}{'-' if axis.label[-1:].isdigit() else ''}{_text(value, index)}"
    return replace(
        variant,
        arm=variant.arm if axis.tuned else variant.arm + part,
        name=variant.name + part,
        assignments=variant.assignments | flatten(axis.assignments(index)),
        values=variant.values | {axis.label: value},
        tuned=(*variant.tuned, index) if axis.tuned else variant.tuned,
    )


def _text(value: Any, index: int) -> str:
    """Write a value for a name; its index where it is too long or a table without a kind."""
    if isinstance(value, list):
        text = "-".join(_text(each, index) for each in value)
    elif isinstance(value, dict):
        text = str(value.get("kind", index))
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value).lower()
    text = re.sub(r"[^\w.-]+", "-", text)
    return text if 0 < len(text) <= _LONGEST else str(index)


def _load(plan: Plan, stage: Stage, source: PlanSource, variant: Variant, seed: int, path: str) -> RunConfig:
    origin, options = f"{source.file}, set or axes of stage {stage.name}", source.options(variant.assignments)
    for key in variant.assignments:
        if key in _OWN_KEYS:
            place = options.get(key, origin)
            raise UserError(f"{place}: {key} cannot be a key of a plan: {_OWN_KEYS[key]}")
    words = tuple(_word(key, value, options.get(key, origin)) for key, value in variant.assignments.items())
    try:
        run = _load_file(variant.config_file, words, origin)
    except ConfigError as error:
        option = _option_of(options, error.keys)
        if option is None:
            raise
        run = _load_file(variant.config_file, words, option)  # raises it with the option
    if run.data.validation is None:
        place = options.get("data.validation", origin)
        raise UserError(f"{place}: data.validation is none: a plan compares held-out losses, set it")
    shuffle_seed = None if run.data.shuffle_seed is None else seed
    return replace(
        run,
        run=replace(run.run, name=Path(path).name, folder=str(Path(plan.folder) / path), seed=seed),
        data=replace(run.data, shuffle_seed=shuffle_seed),
    )


def _word(key: str, value: Any, origin: str) -> str:
    """Write a key with its value as on the command line, in TOML: JSON's strings, numbers and lists are."""
    try:
        return f"--{key}={json.dumps(value, ensure_ascii=False)}"
    except TypeError:
        raise UserError(f"{origin}: {key}: got {value}, which no key takes; as a text, quote it") from None


@functools.cache
def _load_file(path: Path, words: tuple[str, ...], origin: str) -> RunConfig:
    """Load a config once: an edit does not change a plan that is being run."""
    return config.load(RunConfig, path, words, overrides_from=origin)


def _option_of(options: Mapping[str, str], keys: Sequence[tuple[str | int, ...]]) -> str | None:
    """Return the option that sets one of the keys to blame, or a part of one; None where none does."""
    for parts in keys:
        blamed = [part for part in parts if isinstance(part, str)]
        for key, option in options.items():
            if all(one == other for one, other in zip(key.split("."), blamed, strict=False)):
                return option
    return None


def _trunk(stage: Stage, variant: Variant, seed: int, earlier: Sequence[Member]) -> Member | None:
    """Find the member that one of this stage is a branch of; None for a stage without start_from."""
    if stage.start_from is None:
        return None
    found = [
        member
        for member in earlier
        if member.stage == stage.start_from
        and member.seed == seed
        and member.variant.config_file == variant.config_file
        and _agree(member.variant.values, variant.values)
    ]
    if len(found) != 1:
        raise UserError(
            f"stage {stage.name}: {variant.name}, seed {seed}, has {len(found)} members to start from in "
            f"stage {stage.start_from}; want one of the same config and seed and, on axes of both, the same "
            "values"
        )
    return found[0]


def _agree(values: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return all(values[name] == others[name] for name in values.keys() & others.keys())


def _branch(plan: Plan, run: RunConfig, trunk: Member) -> RunConfig:
    """Return a run that starts from the last checkpoint of a member."""
    checkpoint = RunFolder(Path(plan.folder) / trunk.path).checkpoint(trunk.config.training.last_step)
    return replace(run, checkpoint=replace(run.checkpoint, start_from=str(checkpoint)))


def _identity(run: RunConfig) -> str:
    """Return what makes a run, without its name and folder."""
    return config.to_toml(replace(run, run=replace(run.run, name="-", folder="-")))


def _check_names(stage: Stage, members: Sequence[Member]) -> None:
    seen: set[str] = set()
    for member in members:
        name = f"{member.variant.name}_seed{member.seed}"
        if name in seen:
            raise UserError(
                f"stage {stage.name}: two members are called {name}: want config files of different "
                "names, and values of an axis that differ in their first six digits or 24 characters"
            )
        seen.add(name)
