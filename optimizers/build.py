"""The optimizers of a model: which class updates a group of which kind, with which values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, assert_never

import torch
from torch import nn

from optimizers.adamw import AdamW
from optimizers.base import GroupOptimizer
from optimizers.config import (
    AdamWGroup,
    MuonGroup,
    OrthogonalizedAdamWGroup,
    ParameterGroup,
    SOAPGroup,
)
from optimizers.muon import Muon
from optimizers.orthogonalized_adamw import OrthogonalizedAdamW
from optimizers.param_groups import assign_parameters
from optimizers.soap import SOAP

# of a group's config: not values of its param group under these names
_OTHERS = ("kind", "parameters", "lr", "weight_decay", "weight_decay_gamma", "schedule")


def _optimizer(group: ParameterGroup) -> tuple[Callable[..., GroupOptimizer], dict[str, Any]]:
    """Return the optimizer of a group, and the group's own options as its values in a param group."""
    options = {name: value for name, value in vars(group).items() if name not in _OTHERS}
    match group:
        case MuonGroup():
            return Muon, options
        case AdamWGroup():
            return AdamW, {"betas": (options.pop("beta1"), options.pop("beta2")), **options}
        case SOAPGroup():
            return SOAP, options
        case OrthogonalizedAdamWGroup():
            return OrthogonalizedAdamW, options
        case _:
            assert_never(group)


def build_group_optimizers(
    assigned: Mapping[str, Sequence[nn.Parameter]], groups: Mapping[str, ParameterGroup]
) -> list[GroupOptimizer]:
    """Build one optimizer for all groups of a kind.

    Args:
        assigned: The parameters of each group; a group without any is left out.
        groups: Groups by name.

    Returns:
        The optimizers. Every param group has a "name", and the values that the scheduler starts from: the
        peak learning rate "base_lr", "base_weight_decay", and "weight_decay_gamma", 0 for None.
    """
    by_class: dict[Callable[..., GroupOptimizer], list[dict[str, Any]]] = {}
    for name, group in groups.items():
        if not assigned[name]:
            continue
        cls, options = _optimizer(group)
        param_group = {
            "params": list(assigned[name]),
            "name": name,
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "base_lr": group.lr,
            "base_weight_decay": group.weight_decay,
            "weight_decay_gamma": group.weight_decay_gamma or 0.0,
        }
        by_class.setdefault(cls, []).append({**param_group, **options})
    return [cls(param_groups, lr=0.0) for cls, param_groups in by_class.items()]


def create_missing_state(optimizer: GroupOptimizer) -> None:
    """Create the initial state of the parameters that have had no gradient yet.

    A checkpoint is saved and loaded with the state of all parameters.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                optimizer.create_state(p, group)


def state_by_group(
    named_parameters: Iterable[tuple[str, nn.Parameter]], groups: Mapping[str, ParameterGroup]
) -> dict[str, list[torch.Tensor]]:
    """Return the state of a model's optimizers before their first step, on the meta device.

    Args:
        named_parameters: Names in the unwrapped model and parameters, on any device.
        groups: Groups by name.

    Returns:
        The state tensors of each group but scalars such as a number of steps; they hold no memory.

    Raises:
        UserError: The groups do not fit the parameters.
    """
    assigned = {
        name: [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
        for name, parameters in assign_parameters(named_parameters, groups).items()
    }
    states: dict[str, list[torch.Tensor]] = {}
    for optimizer in build_group_optimizers(assigned, groups):
        create_missing_state(optimizer)
        for group in optimizer.param_groups:
            tensors = [x for p in group["params"] for x in optimizer.state[p].values()]
            states[group["name"]] = [x for x in tensors if isinstance(x, torch.Tensor) and x.ndim > 0]
    return states
