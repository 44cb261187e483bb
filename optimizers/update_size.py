"""How large the updates of a step were, computed on the device from what the optimizers keep."""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate


@runtime_checkable
class UpdateRecorder(Protocol):
    """An optimizer that can tell of its last update, as Muon does.

    Attributes:
        record_updates: Whether step() keeps what the methods below tell; set before the step.
    """

    record_updates: bool

    def update_square_sums(self) -> dict[str, torch.Tensor]:
        """Return, by group name, the sum over this rank's own elements of the last update's squares.

        The update is what the learning rate multiplies, without weight decay. fp32 scalars on the device, not
        reduced over ranks; a replica (HSDP) counts its elements as if there were no other.
        """
        ...

    def update_spectra(self) -> dict[str, tuple[float, float, float]]:
        """Return (least, median, largest) singular value of one matrix of a group, by group name.

        The matrix is the first of the group that this rank orthogonalises, as orthogonalised, before scaling;
        groups of which it has none are left out. Waits for the device.
        """
        ...


def num_replicas(parameter: torch.Tensor) -> int:
    """Return how many ranks hold each element of a parameter.

    Args:
        parameter: A plain tensor, which every rank holds whole, or a DTensor.

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


def adamw_square_sum(optimizer: torch.optim.AdamW, group: dict[str, Any]) -> torch.Tensor:
    """Return this rank's share of the squared norm of AdamW's last update of a group.

    The update is what the learning rate multiplies, without weight decay (Loshchilov and Hutter, arXiv
    1711.05101): mhat / (sqrt(vhat) + eps) with mhat = m / (1 - beta1^n), vhat = v / (1 - beta2^n) after n
    steps, which is the state that the step left behind. Takes the memory of two copies of the largest
    parameter's own part.

    Args:
        optimizer: The optimizer, just after its step; no amsgrad.
        group: One of its param groups.

    Returns:
        fp32 scalar on the parameters' device; its sum over all ranks counts every element once.
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
        square_sum = mean.div(denominator).square_().sum() / (1.0 - beta1**num_steps).square()
        # without a step yet this is 0/0
        total += torch.where(num_steps > 0, square_sum, 0.0) / num_replicas(p)
    return total


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
