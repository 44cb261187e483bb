"""Compare the config saved in a run folder with the config of a launch, key by key.

Saved configs are tables as in TOML, where "none" stands for None. A config saved by an earlier version of the
code lacks the keys introduced since.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from config import Table, from_table, to_table
from errors import UserError
from models.config import FREE_KEYS
from models.qwen3 import Qwen3
from optimizers.config import OptimizerConfig, ScheduleConfig
from optimizers.schedule import group_schedule, lr_factor, weight_decay_factor
from training.config_differences import KeyPath, describe_difference, differences, differences_at
from training.run_config import RunConfig
from training.step_configs import StepConfig

# keys that decide what a token of a sequence attends to
SEQUENCE_KEYS: tuple[KeyPath, ...] = (("training", "seq_len"), ("data", "mask_documents"))
# keys that decide which tokens a run reads, and in which order
_DATA_KEYS: tuple[KeyPath, ...] = (("data", "train"), ("data", "packing"), ("data", "shuffle_seed"))
_TRAINING_KEYS: tuple[KeyPath, ...] = (
    *(("training", "global_batch_size"), ("training", "max_grad_norm"), ("training", "precision")),
    *(("training", "z_loss"), ("training", "spike_ratio"), ("training", "skip_spikes")),
    *(("average", "decay"), ("average", "start_step")),
    *(("run", "seed"), ("data", "validation_documents"), ("eval", "max_tokens"), ("data", "validation")),
    # the windows after the saved one
    ("data", "shuffle_window"),
)
# of an optimizer group: _rate_differences compares what they make of each step
_RATE_KEYS = ("lr", "weight_decay", "weight_decay_gamma", "schedule")


def check_model(config: RunConfig, saved: Table, source: Path, remedy: str) -> None:
    """Raise unless checkpoints of a saved config hold this config's architecture.

    Args:
        config: The config of the run that loads a checkpoint.
        saved: The config of the run that wrote it.
        source: The checkpoint or its run folder, for the message.
        remedy: The alternative to restoring the keys, for the message.

    Raises:
        UserError: The architectures differ; names the keys with both values.
    """
    saved_model = _fill_defaults(saved["model"], config.model)
    differing = differences(saved_model, to_table(config.model), "model", ignored=FREE_KEYS)
    if differing:
        raise UserError(
            f"{source} holds checkpoints of another architecture: {'; '.join(differing)}. "
            f"{remedy}, or restore these keys"
        )


def check_compatible(config: RunConfig, saved: Table, source: Path, remedy: str) -> None:
    """Raise unless a checkpoint of a saved config has this config's architecture and optimizer state.

    Args:
        config: The config of the run that loads the checkpoint.
        saved: The config of the run that wrote it.
        source: The checkpoint or its run folder, for the message.
        remedy: The alternative to restoring the keys, for the message.

    Raises:
        UserError: [model], or the parameters or kind of an optimizer group, differ (names the keys with both
            values), or there is no optimizer state.
    """
    check_model(config, saved, source, remedy)
    if "optimizer" not in saved:
        raise UserError(
            f"{source} holds weights without optimizer state, as models.convert writes them: give this run a "
            "folder of its own, and set checkpoint.initial_weights to that one"
        )
    differing = _optimizer_differences(config, saved["optimizer"])
    if differing:
        raise UserError(
            f"{source} holds checkpoints of other optimizers: {'; '.join(differing)}. "
            f"{remedy}, or restore these groups"
        )


def sequence_differences(config: RunConfig, saved: Table) -> list[str]:
    """Describe the differences in the sequences: their length, and document masking."""
    return differences_at(config, saved, SEQUENCE_KEYS)


def data_differences(config: RunConfig, saved: Table) -> list[str]:
    """Describe the differences in the training documents, their packing and their order."""
    return differences_at(config, saved, _DATA_KEYS)


def training_differences(config: RunConfig, saved: StepConfig) -> list[str]:
    """Describe the differences between steps that have been taken and those of this config.

    Args:
        config: The config.
        saved: The steps and their config, of compatible model and optimizers.

    Returns:
        One phrase per key of batch, clipping, precision, validation and optimizer groups; where a learning
        rate or weight decay was another, the keys of the schedule that differ, and for each group the first
        such step.

    Raises:
        ConfigError: [optimizer] or [schedule] was saved by an incompatible version of the code.
    """
    keys = [*_TRAINING_KEYS]
    for name, group in to_table(config.optimizer)["groups"].items():
        # check_compatible compares the parameters
        others = (key for key in group if key not in ("parameters", *_RATE_KEYS))
        keys += [("optimizer", "groups", name, key) for key in others]
    rates = _rate_differences(config, saved)
    # a schedule that differs only in other steps changes nothing
    causes = differences_at(config, saved.table, _schedule_keys(config)) if rates else []
    return [*differences_at(config, saved.table, keys), *causes, *rates]


def _schedule_keys(config: RunConfig) -> list[tuple[str, ...]]:
    schedule = [("schedule", field.name) for field in dataclasses.fields(config.schedule)]
    groups = [("optimizer", "groups", name, key) for name in config.optimizer.groups for key in _RATE_KEYS]
    return [("training", "steps"), *schedule, *groups]


def _fill_defaults(saved: Table, config: Any) -> Table:
    """Add the keys that a saved table does not have, with their defaults in the class of config."""
    filled = dict(saved)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            child = filled.get(field.name, {})
            filled[field.name] = _fill_defaults(child, value) if isinstance(child, dict) else child
        elif field.name not in filled and field.default is not dataclasses.MISSING:
            filled[field.name] = to_table(field.default)
    return filled


def _optimizer_differences(config: RunConfig, saved: Table) -> list[str]:
    """Describe the groups that have other parameters, whatever the patterns, or another kind of optimizer."""
    saved_groups, groups = _group_kinds(saved), _group_kinds(to_table(config.optimizer))
    with torch.device("meta"):
        names = [name for name, _ in Qwen3(config.model).named_parameters()]

    def matches(group: Table) -> set[str]:
        return {name for name in names for pattern in group["parameters"] if re.fullmatch(pattern, name)}

    for name in saved_groups.keys() & groups.keys():
        if matches(saved_groups[name]) == matches(groups[name]):
            saved_groups[name]["parameters"] = groups[name]["parameters"]
    return differences(saved_groups, groups, "optimizer.groups")


def _group_kinds(optimizer: Table) -> Table:
    groups = optimizer.get("groups", {})
    return {name: {key: group.get(key) for key in ("kind", "parameters")} for name, group in groups.items()}


def _rate_differences(config: RunConfig, saved: StepConfig) -> list[str]:
    """Describe, for each group, the first of the steps with another learning rate or weight decay."""
    table, steps = saved.table, range(saved.first - 1, saved.last)
    schedule = from_table(ScheduleConfig, table["schedule"], saved.source, "schedule")
    optimizer = from_table(OptimizerConfig, table["optimizer"], saved.source, "optimizer")
    total_steps = table["training"].get("steps", config.training.steps)
    saved_rates = _rates(optimizer, schedule, total_steps, steps)
    rates = _rates(config.optimizer, config.schedule, config.training.steps, steps)
    differing = []
    for name, values in rates.items():
        pairs = enumerate(zip(saved_rates[name], values, strict=True), start=saved.first)
        first = next(((s, a, b) for s, (a, b) in pairs if a != b), None)
        if first is not None:
            at_step, before, now = first
            differing.append(
                describe_difference(f"{name} at step {at_step}", float(f"{before:.6g}"), float(f"{now:.6g}"))
            )
    return differing


def _rates(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, total_steps: int, steps: range
) -> dict[str, list[float]]:
    """Return learning rate and weight decay of each group in some steps of a run, counted from 0."""
    rates: dict[str, list[float]] = {}
    for name, group in optimizer.groups.items():
        gamma, own = group.weight_decay_gamma or 0.0, group_schedule(group, schedule)
        rates[f"lr of group {name}"] = [group.lr * lr_factor(s, own, total_steps) for s in steps]
        rates[f"weight_decay of group {name}"] = [
            group.weight_decay * weight_decay_factor(s, own, total_steps, gamma) for s in steps
        ]
    return rates
