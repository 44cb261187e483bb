"""Squared norms of an optimizer's last update, measured by the change of the weights."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from optimizers.base import local


class WeightChange:
    """Compares the weights of param groups before and after a step; takes a copy of this rank's shards.

    The difference is that of rounded weights: in fp32 it is off by about 1e-7 of a weight over its update.

    Args:
        groups: The groups, before the step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        # a learning rate of 0 says nothing about the update
        self._groups = [group for group in groups if group["lr"] != 0.0]
        self._before = [[local(p).detach().clone() for p in group["params"]] for group in self._groups]

    def local_squared_norms(self) -> dict[str, torch.Tensor]:
        """Return what GroupOptimizer.local_update_squared_norms describes, after the step.

        A shard that did not move had no update, nor weight decay: the step was skipped, or left it out.
        """
        norms = {}
        for group, before in zip(self._groups, self._before, strict=True):
            total = torch.zeros((), device=group["params"][0].device)
            for p, old in zip(group["params"], before, strict=True):
                new = local(p).detach()
                has_moved = (new != old).any()
                decayed = old.float().mul_(1.0 - group["lr"] * group["weight_decay"])
                squared_norm = decayed.sub_(new).square_().sum() / num_replicas(p)
                total += torch.where(has_moved, squared_norm, 0.0)
            norms[group["name"]] = total / group["lr"] ** 2
        return norms


def num_replicas(parameter: torch.Tensor) -> int:
    """Return the number of ranks that hold each element of a parameter.

    Args:
        parameter: A plain tensor, which every rank holds in full, or a DTensor.

    Returns:
        Ranks divided by shards; 1 without a process group.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(parameter, DTensor):
        return num_ranks
    for axis, placement in enumerate(parameter.placements):
        if not isinstance(placement, Replicate):
            num_ranks //= parameter.device_mesh.size(axis)
    return num_ranks
