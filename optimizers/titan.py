"""What torchtitan's trainer takes from here: the optimizers of a model and their schedule."""

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
from optimizers.schedule import lr_factor, weight_decay_factor
from optimizers.update_size import UpdateRecorder, adamw_square_sum, num_replicas

_STATE_PREFIX = "state."


class GroupedOptimizers(OptimizersContainer[torch.optim.Optimizer]):
    """The optimizers of a model: for each of its parts at most one Muon and one AdamW.

    A checkpoint holds their tensors by parameter name and no hyperparameters: those always come from the
    configuration of the run that loads it. Every param group has its "name" and what the schedule starts
    from: its peak learning rate "base_lr", "base_weight_decay", and "weight_decay_gamma", 0 for None.
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
        self._num_elements = {name: sum(p.numel() for p in members) for name, members in assigned.items()}
        self._post_init([p for members in assigned.values() for p in members], {})

    def step(self, *, found_inf: torch.Tensor | None = None) -> None:  # pyrefly: ignore [bad-override]
        """Update every parameter, or none of them.

        Args:
            found_inf: fp32 scalar on the parameters' device, the same on every rank: 1 leaves parameters and
                state untouched, which only the device needs to know; 0 or None takes the step. It is torch's
                own convention (GradScaler and fused AdamW), an attribute of each optimizer during its step.
        """
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf  # pyrefly: ignore [missing-attribute]
            optimizer.step()
            optimizer.found_inf = None  # pyrefly: ignore [missing-attribute]

    def record_updates(self, is_recorded: bool) -> None:
        """Say before a step whether the methods below will be asked about it.

        Args:
            is_recorded: Whether optimizers keep what their state does not tell.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer, UpdateRecorder):
                optimizer.record_updates = is_recorded

    def update_mean_squares(self) -> dict[str, torch.Tensor]:
        """Return this rank's share of the last update's mean square, by group.

        Returns:
            fp32 scalars on the device, for the same groups in the same order on every rank. Summed over all
            ranks, each is the mean over its group of (update / learning rate)^2, without weight decay.
        """
        shares: dict[str, torch.Tensor] = {}
        for optimizer in self.optimizers:
            sums = optimizer.update_square_sums() if isinstance(optimizer, UpdateRecorder) else {}
            for group in optimizer.param_groups:
                name = group["name"]
                if isinstance(optimizer, torch.optim.AdamW):
                    square_sum = adamw_square_sum(optimizer, group)
                elif name in sums:
                    square_sum = sums[name] / num_replicas(group["params"][0])
                else:
                    continue
                shares[name] = shares.get(name, 0.0) + square_sum / self._num_elements[name]
        return shares

    def update_spectra(self) -> dict[str, tuple[float, float, float]]:
        """Return (least, median, largest) singular value of one orthogonalised matrix, by Muon group.

        Returns:
            Those of the first matrix of the group that this rank orthogonalises; nothing for groups of which
            it has none. Waits for the device.
        """
        recorders = [optimizer for optimizer in self.optimizers if isinstance(optimizer, UpdateRecorder)]
        return {name: spread for each in recorders for name, spread in each.update_spectra().items()}

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
        for optimizer in self.optimizers:
            _create_missing_state(optimizer)
        flattened: dict[str, Any] = {}
        for part, own in zip(self.model_parts, self._by_part, strict=True):
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            flattened.update(get_optimizer_state_dict(part, own, options=options))
        return flattened


class GroupedSchedule(LRSchedulersContainer):
    """Sets every group's learning rate and weight decay for the next step, from the first step on.

    Each is the group's value times the schedule's factor, a pure function of the step.
    """

    def __init__(self, optimizers: OptimizersContainer, schedule: ScheduleConfig, total_steps: int) -> None:
        """Start at step 0.

        Args:
            optimizers: What build_optimizers gave.
            schedule: The factors' configuration.
            total_steps: Steps of the run.

        Raises:
            ValueError: The schedule does not fit into the steps.
        """
        self._optimizers = optimizers
        self._lr_factor = functools.partial(lr_factor, config=schedule, total_steps=total_steps)
        self._weight_decay_factor = functools.partial(
            weight_decay_factor, config=schedule, total_steps=total_steps
        )
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

    def weight_decay_by_group(self) -> dict[str, float]:
        """Return the weight decay of the step about to be taken, by group name."""
        return {group["name"]: group["weight_decay"] for group in self._groups()}

    def _groups(self) -> list[dict[str, Any]]:
        # looked up each time: loading a state gives an optimizer new groups
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _apply(self) -> None:
        factor = self._lr_factor(self._step)
        for group in self._groups():
            group["lr"] = group["base_lr"] * factor
            group["weight_decay"] = group["base_weight_decay"] * self._weight_decay_factor(
                self._step, gamma=group["weight_decay_gamma"]
            )


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
        param_group = {
            "params": members,
            "name": name,
            "base_lr": group.lr,
            "base_weight_decay": group.weight_decay,
            "weight_decay_gamma": group.weight_decay_gamma or 0.0,
        }
        if isinstance(group, MuonGroup):
            muon_groups.append({**param_group, **_muon_values(group)})
        else:
            adamw_groups.append({**param_group, **_adamw_values(group)})
    optimizers: list[torch.optim.Optimizer] = []
    if muon_groups:
        optimizers.append(Muon(muon_groups, lr=0.0))
    if adamw_groups:
        # fused on CPU too: the other implementations have no found_inf
        optimizers.append(torch.optim.AdamW(adamw_groups, fused=True))
    return optimizers


def _create_missing_state(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter that has had no gradient yet the state from before a first step.

    Whoever loads a checkpoint wants the state of all parameters, whichever of them had gradients.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state[p]:
                continue
            if isinstance(optimizer, Muon):
                optimizer.create_state(p, group)
            else:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": step, **moments}


def _muon_values(group: MuonGroup) -> dict[str, Any]:
    not_its_own = ("kind", "parameters", "weight_decay_gamma")
    return {key: value for key, value in asdict(group).items() if key not in not_its_own}


def _adamw_values(group: AdamWGroup) -> dict[str, Any]:
    return {
        "lr": group.lr,
        "betas": (group.beta1, group.beta2),
        "eps": group.eps,
        "weight_decay": group.weight_decay,
    }
