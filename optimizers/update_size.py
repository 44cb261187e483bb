"""Squared norms of the last update, computed on the device from the optimizers' state."""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate


@runtime_checkable
class SupportsUpdateStats(Protocol):
    """An optimizer that can record statistics of its last update, such as Muon.

    Attributes:
        record_update_stats: Whether step() records what the methods return; set it before the step.
    """

    record_update_stats: bool

    def local_update_squared_norms(self) -> dict[str, torch.Tensor]:
        """Return the squared norm of this rank's shards of the last update, by group name.

        The update is the factor of the learning rate, without weight decay. fp32 scalars on the device, not
        reduced over ranks; HSDP replicas each count their elements.
        """
        ...

    def update_singular_values(self) -> dict[str, tuple[float, float, float]]:
        """Return the minimum, median and maximum singular value of one matrix of a group, by group name.

        The matrix is the first of the group that this rank orthogonalizes, before scaling; groups without one
        are left out. Synchronizes with the device.
        """
        ...


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


def adamw_update_squared_norm(optimizer: torch.optim.AdamW, group: dict[str, Any]) -> torch.Tensor:
    """Return this rank's part of the squared norm of AdamW's last update of a param group.

    The update is the factor of the learning rate, without weight decay (Loshchilov and Hutter, arXiv
    1711.05101): mhat / (sqrt(vhat) + eps) with mhat = m / (1 - beta1^n), vhat = v / (1 - beta2^n) after n
    steps, computed from the state after the step. Allocates two copies of the largest local shard.

    Args:
        optimizer: The optimizer right after its step; without amsgrad.
        group: One of its param groups.

    Returns:
        fp32 scalar on the parameters' device; summed over all ranks, it counts every element once.
    """
    beta1, beta2 = group["betas"]
    total = torch.zeros((), device=group["params"][0].device)
    for p in group["params"]:
        state = optimizer.state.get(p)
        if not state:
            continue
        mean, mean_square = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        num_steps = state["step"]
        denominator = mean_square.sqrt().div_((1.0 - beta2**num_steps).sqrt()).add_(group["eps"])
        squared_norm = mean.div(denominator).square_().sum() / (1.0 - beta1**num_steps).square()
        # 0/0 before the first step
        total += torch.where(num_steps > 0, squared_norm, 0.0) / num_replicas(p)
    return total


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
