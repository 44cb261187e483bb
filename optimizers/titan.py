"""Optimizers and learning-rate scheduler as torchtitan's trainer takes them."""

from collections.abc import Sequence
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

from errors import UserError
from optimizers.base import GroupOptimizer
from optimizers.build import build_group_optimizers, create_missing_state
from optimizers.config import OptimizerConfig, ScheduleConfig
from optimizers.hyperball import FixedNorms
from optimizers.param_groups import assign_parameters, unwrapped_named_parameters
from optimizers.schedule import lr_factor, schedules_by_group, weight_decay_factor
from optimizers.update_size import WeightChange

_STATE_PREFIX = "state."


class ParamGroupOptimizers(OptimizersContainer[GroupOptimizer]):
    """The optimizers of a model: at most one of each kind per model part.

    A checkpoint has their state tensors by parameter name and no hyperparameters: these always come from the
    configuration of the run that loads it.

    Args:
        model_parts: Modules with disjoint parameters, usually one, sharded and on their device.
        config: Parameter groups.

    Raises:
        UserError: A parameter is in no group or in several, or a group does not fit its parameters.
    """

    def __init__(self, model_parts: Sequence[nn.Module], config: OptimizerConfig) -> None:
        self.model_parts = list(model_parts)
        self.groups = config.groups
        named = [named for part in self.model_parts for named in unwrapped_named_parameters(part)]
        assigned = assign_parameters(named, config.groups)
        self._by_part = []
        for part in self.model_parts:
            own = set(part.parameters())
            members = {name: [p for p in all_parts if p in own] for name, all_parts in assigned.items()}
            self._by_part.append(build_group_optimizers(members, config.groups))
        self.optimizers = [optimizer for own in self._by_part for optimizer in own]
        self._num_elements = {name: sum(p.numel() for p in members) for name, members in assigned.items()}
        self._squared_norms: dict[GroupOptimizer, dict[str, torch.Tensor]] = {}
        # the container's own constructor would build its optimizers; step hooks need the base class's
        torch.optim.Optimizer.__init__(self, [p for members in assigned.values() for p in members], {})

    def step(self, *, found_inf: torch.Tensor | None = None) -> None:  # pyrefly: ignore [bad-override]
        """Update all parameters, or none of them.

        Args:
            found_inf: fp32 scalar on the parameters' device, equal on all ranks. 1 leaves parameters and
                state unchanged without a host-device synchronization; 0 or None applies the step. This is
                torch's convention (GradScaler and fused AdamW): an attribute of each optimizer during its
                step.
        """
        self._squared_norms.clear()
        for optimizer in self.optimizers:
            spheres = FixedNorms(optimizer)
            change = WeightChange(_compared_groups(optimizer)) if optimizer.record_update_stats else None
            optimizer.found_inf = found_inf
            optimizer.step()
            if optimizer.record_update_stats and optimizer.measures_updates:
                self._squared_norms[optimizer] = optimizer.local_update_squared_norms()
            optimizer.found_inf = None
            spheres.apply()
            if change is not None:
                self._squared_norms.setdefault(optimizer, {}).update(change.local_squared_norms())

    def record_update_stats(self, enabled: bool) -> None:
        """Enable or disable the statistics of the next steps' updates.

        Args:
            enabled: Whether `local_update_mean_squares` and `update_singular_values` are called after a step.
        """
        for optimizer in self.optimizers:
            optimizer.record_update_stats = enabled

    def local_update_mean_squares(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of the last recorded update's mean square, by group name.

        Returns:
            fp32 scalars on the device, for the same groups in the same order on every rank. Summed over all
            ranks, each is the mean of (update / learning rate)^2 over the group, without weight decay; 0 for
            weights that did not move. Nothing if the last step was not recorded.
        """
        mean_squares: dict[str, torch.Tensor] = {}
        for optimizer in self.optimizers:
            squared_norms = self._squared_norms.get(optimizer, {})
            for name in (group["name"] for group in optimizer.param_groups if group["name"] in squared_norms):
                part = squared_norms[name] / self._num_elements[name]
                mean_squares[name] = mean_squares.get(name, 0.0) + part
        return mean_squares

    def update_singular_values(self) -> dict[str, tuple[float, float, float]]:
        """Return the minimum, median and maximum singular value of one orthogonalized matrix, by Muon group.

        Synchronizes with the device.

        Returns:
            The values of the first matrix of the group that this rank orthogonalizes; groups without one are
            left out.
        """
        return {
            name: spread
            for optimizer in self.optimizers
            for name, spread in optimizer.update_singular_values().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state tensors as "state.<parameter>.<name>", sharded like the parameters."""
        return {key: value for key, value in self._flattened().items() if key.startswith(_STATE_PREFIX)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state tensors; hyperparameters remain those of the configuration.

        Args:
            state_dict: From state_dict(), for the same parameters in groups of the same kinds.

        Raises:
            UserError: Keys are missing or unexpected, as from another model or other groups.
        """
        current = self._flattened()
        expected = {key for key in current if key.startswith(_STATE_PREFIX)}
        differing = sorted(expected.symmetric_difference(state_dict))
        if differing:
            raise UserError(
                f"optimizer state does not fit the model and its groups: {len(differing)} keys are missing "
                f"or unexpected, for example {differing[0]}; use the model and groups that it was saved with"
            )
        for part, own in zip(self.model_parts, self._by_part, strict=True):
            set_optimizer_state_dict(
                part,
                own,
                optim_state_dict={**current, **state_dict},
                options=StateDictOptions(flatten_optimizer_state_dict=True),
            )

    def _flattened(self) -> dict[str, Any]:
        """Return state and hyperparameters by parameter name; creates missing state."""
        for optimizer in self.optimizers:
            create_missing_state(optimizer)
        flattened: dict[str, Any] = {}
        for part, own in zip(self.model_parts, self._by_part, strict=True):
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            flattened.update(get_optimizer_state_dict(part, own, options=options))
        return flattened


def _compared_groups(optimizer: GroupOptimizer) -> list[dict[str, Any]]:
    """Return the param groups whose updates the optimizer does not measure, or that FixedNorms changes."""
    groups = optimizer.param_groups
    return [group for group in groups if group.get("fixed_norm") or not optimizer.measures_updates]


class ParamGroupScheduler(LRSchedulersContainer):
    """Scheduler of every group's learning rate and weight decay.

    Each is the group's base value times a factor that is a pure function of the step.

    Args:
        optimizers: From build_optimizers.
        schedule: The schedule of the groups without one of their own.
        total_steps: Number of steps of the run.

    Raises:
        UserError: As schedules_by_group.
    """

    def __init__(self, optimizers: OptimizersContainer, schedule: ScheduleConfig, total_steps: int) -> None:
        assert isinstance(optimizers, ParamGroupOptimizers)
        self._optimizers = optimizers
        self._schedules = schedules_by_group(optimizers.groups, schedule, total_steps)
        self._total_steps = total_steps
        self._step = 0
        self._apply()

    def step(self) -> None:
        """Set the learning rates and weight decays of the next step."""
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of completed steps, the only state."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after a number of completed steps, with this run's schedule.

        Args:
            state_dict: From state_dict().
        """
        self._step = int(state_dict["step"])
        self._apply()

    def lr_by_group(self) -> dict[str, float]:
        """Return the learning rate of the next step, by group name."""
        return {group["name"]: group["lr"] for group in self._groups()}

    def weight_decay_by_group(self) -> dict[str, float]:
        """Return the weight decay of the next step, by group name."""
        return {group["name"]: group["weight_decay"] for group in self._groups()}

    def _groups(self) -> list[dict[str, Any]]:
        # not cached: loading a state dict replaces an optimizer's param groups
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def _apply(self) -> None:
        for group in self._groups():
            at = self._step, self._schedules[group["name"]], self._total_steps
            group["lr"] = group["base_lr"] * lr_factor(*at)
            decay_factor = weight_decay_factor(*at, gamma=group["weight_decay_gamma"])
            group["weight_decay"] = group["base_weight_decay"] * decay_factor


def build_optimizers(model_parts: Sequence[nn.Module], config: OptimizerConfig) -> ParamGroupOptimizers:
    """Build the optimizers of a model.

    Args:
        model_parts: Modules with disjoint parameters, usually one, sharded and on their device.
        config: Parameter groups.

    Returns:
        A container of all optimizers.

    Raises:
        UserError: A parameter is in no group or in several, or a group does not fit its parameters.
    """
    return ParamGroupOptimizers(model_parts, config)


def build_lr_schedulers(
    optimizers: OptimizersContainer, schedule: ScheduleConfig, total_steps: int
) -> ParamGroupScheduler:
    """Build the scheduler of all groups, and set the first step's learning rates and weight decays.

    Args:
        optimizers: From build_optimizers.
        schedule: The schedule of the groups without one of their own.
        total_steps: Number of steps of the run.

    Returns:
        The scheduler, at step 0.

    Raises:
        UserError: As schedules_by_group.
    """
    return ParamGroupScheduler(optimizers, schedule, total_steps)
