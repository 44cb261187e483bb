"""What torchtitan's trainer takes from here: the optimizers of a model and their learning-rate schedule."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer

from optimizers.config import (
    AdamWGroup,
    MuonGroup,
    OptimizerConfig,
    ParameterGroup,
    ScheduleConfig,
)
from optimizers.muon import Muon
from optimizers.param_groups import assign_parameters
from optimizers.schedule import lr_factor

_STATE_PREFIX = "state."


class GroupedOptimizers(OptimizersContainer[torch.optim.Optimizer]):
    """The optimizers of a model: for each of its parts at most one Muon and one AdamW.

    A checkpoint holds their tensors by parameter name and no hyperparameters: those always come from the
    configuration of the run that loads it. Every param group has its "name" and its peak learning rate
    "base_lr".
    """

    def __init__(self, model_parts: Sequence[nn.Module], config: OptimizerConfig) -> None:
        """Build the optimizers.

        Args:
            model_parts: Modules with disjoint parameters, usually one, sharded and on their device.
            config: Groups of parameters.

        Raises:
            ValueError: A parameter is in no group or in several, or a group does not fit.
        """
        self.model_parts = list(model_parts)
        named = [named for part in self.model_parts for named in part.named_parameters()]
        assigned = assign_parameters(named, config.groups)
        self._by_part = [_optimizers_of(part, assigned, config.groups) for part in self.model_parts]
        self.optimizers = [optimizer for own in self._by_part for optimizer in own]
        self._post_init([p for members in assigned.values() for p in members], {})

    def state_dict(self) -> dict[str, Any]:
        """Return the state tensors as "state.<parameter>.<name>", sharded as the parameters are."""
        return {key: value for key, value in self._flattened().items() if key.startswith(_STATE_PREFIX)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state tensors; hyperparameters stay those of the configuration.

        Args:
            state_dict: What state_dict() gave, for the same parameters in groups of the same kind.

        Raises:
            ValueError: State is missing or left over, as from another model or other groups.
        """
        current = self._flattened()
        expected = {key for key in current if key.startswith(_STATE_PREFIX)}
        differing = sorted(expected.symmetric_difference(state_dict))
        if differing:
            raise ValueError(
                f"optimizer state does not fit the model and its groups: {len(differing)} entries missing "
                f"or left over, among them {differing[0]}; use the model and groups that it was saved with"
            )
        for part, own in zip(self.model_parts, self._by_part, strict=True):
            set_optimizer_state_dict(
                part,
                own,
                optim_state_dict={**current, **state_dict},
                options=StateDictOptions(flatten_optimizer_state_dict=True),
            )

    def _flattened(self) -> dict[str, Any]:
        """Return state and hyperparameters by parameter name, creating state that is not there yet."""
        fresh = [optimizer for optimizer in self.optimizers if not optimizer.state]
        flattened: dict[str, Any] = {}
        for part, own in zip(self.model_parts, self._by_part, strict=True):
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            flattened.update(get_optimizer_state_dict(part, own, options=options))
        # State is created by a step with zero gradients and lr 0; without this AdamW would count it as taken.
        for optimizer in fresh:
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()
        return flattened


class GroupedSchedule(LRSchedulersContainer):
    """Sets every group's learning rate to its peak times the schedule's factor, from the first step on."""

    def __init__(self, optimizers: OptimizersContainer, schedule: ScheduleConfig, total_steps: int) -> None:
        """Start at step 0.

        Args:
            optimizers: What build_optimizers gave.
            schedule: The factor's configuration.
            total_steps: Steps of the run.

        Raises:
            ValueError: The schedule does not fit into the steps.
        """
        self._optimizers = optimizers
        self._factor = functools.partial(lr_factor, config=schedule, total_steps=total_steps)
        self._step = 0
        self._apply()

    def step(self) -> None:
        """Move to the next optimizer step."""
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken, the whole state."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after a number of steps, by this run's schedule.

        Args:
            state_dict: What state_dict() gave.
        """
        self._step = int(state_dict["step"])
        self._apply()

    def lr_by_group(self) -> dict[str, float]:
        """Return the learning rate of the step about to be taken, by group name."""
        return {group["name"]: group["lr"] for group in self._groups()}

    def _groups(self) -> list[dict[str, Any]]:
        # looked up each time: loading a state gives an optimizer new groups
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _apply(self) -> None:
        factor = self._factor(self._step)
        for group in self._groups():
            group["lr"] = group["base_lr"] * factor


def build_optimizers(model_parts: Sequence[nn.Module], config: OptimizerConfig) -> GroupedOptimizers:
    """Build the optimizers of a model.

    Args:
        model_parts: Modules with disjoint parameters, usually one, sharded and on their device.
        config: Groups of parameters.

    Returns:
        One container with all of them.

    Raises:
        ValueError: A parameter is in no group or in several, or a group does not fit.
    """
    return GroupedOptimizers(model_parts, config)


def build_lr_schedulers(
    optimizers: OptimizersContainer, schedule: ScheduleConfig, total_steps: int
) -> GroupedSchedule:
    """Build the learning-rate schedule of all groups and set the first step's learning rates.

    Args:
        optimizers: What build_optimizers gave.
        schedule: The schedule.
        total_steps: Steps of the run.

    Returns:
        The schedule, at step 0.

    Raises:
        ValueError: The schedule does not fit into the steps.
    """
    return GroupedSchedule(optimizers, schedule, total_steps)


def _optimizers_of(
    part: nn.Module, assigned: Mapping[str, list[nn.Parameter]], groups: Mapping[str, ParameterGroup]
) -> list[torch.optim.Optimizer]:
    """Build one Muon and one AdamW, where they have parameters, for one part of a model."""
    own = set(part.parameters())
    muon_groups: list[dict[str, Any]] = []
    adamw_groups: list[dict[str, Any]] = []
    for name, group in groups.items():
        members = [p for p in assigned[name] if p in own]
        if not members:
            continue
        param_group = {"params": members, "name": name, "base_lr": group.lr}
        if isinstance(group, MuonGroup):
            muon_groups.append({**param_group, **_muon_values(group)})
        else:
            adamw_groups.append({**param_group, **_adamw_values(group)})
    optimizers: list[torch.optim.Optimizer] = []
    if muon_groups:
        optimizers.append(Muon(muon_groups, lr=0.0))
    if adamw_groups:
        fused = all(p.device.type == "cuda" for group in adamw_groups for p in group["params"])
        optimizers.append(torch.optim.AdamW(adamw_groups, fused=fused, foreach=not fused))
    return optimizers


def _muon_values(group: MuonGroup) -> dict[str, Any]:
    return {key: value for key, value in asdict(group).items() if key not in ("kind", "parameters")}


def _adamw_values(group: AdamWGroup) -> dict[str, Any]:
    return {
        "lr": group.lr,
        "betas": (group.beta1, group.beta2),
        "eps": group.eps,
        "weight_decay": group.weight_decay,
    }
