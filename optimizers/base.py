"""The contract of the optimizers that parameter groups choose."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class GroupOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer of parameter groups, all of one kind.

    Its constructor takes param groups and `lr`. A param group has the fields of its config as values, as
    optimizers/build.py passes them, and "name"; "lr" and "weight_decay" are those of the step. A step skips
    parameters without a gradient.

    Attributes:
        found_inf: fp32 scalar on the device, equal on all ranks, or None. Where it is not zero, a step leaves
            parameters and state as they are; without a host-device synchronization but in SOAP.
        record_update_stats: Whether a step records what the two methods for statistics return.
        measures_updates: Whether `local_update_squared_norms` is implemented. Where it is not, the container
            compares the weights before and after the steps that are recorded, which takes a copy of them.
    """

    found_inf: torch.Tensor | None = None
    record_update_stats: bool = False
    measures_updates: bool = False

    @abstractmethod
    def create_state(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        """Create the initial state of a parameter: all that a checkpoint has to hold.

        Also called with parameters on the meta device, for the memory and the size of a checkpoint.

        Args:
            p: The parameter, perhaps sharded.
            group: Its param group.
        """

    def assign(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a value into a weight or state, both as `local` gives them, unless the step is skipped."""
        if self.found_inf is not None:
            value = torch.where(self.found_inf != 0, target, value)
        target.copy_(value)

    def local_update_squared_norms(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of the squared norm of the last recorded update, by group name.

        The update is the factor of the learning rate, without weight decay; 0 in a skipped step, and of
        parameters without a gradient. Called after the step, with its found_inf and its gradients.

        Returns:
            fp32 scalars on the device; summed over all ranks, each counts every element once. Groups with a
            learning rate of 0 may be left out.

        Raises:
            NotImplementedError: The optimizer does not measure its updates (measures_updates).
        """
        raise NotImplementedError(f"{type(self).__name__} does not measure its updates")

    def update_singular_values(self) -> dict[str, tuple[float, float, float]]:
        """Return the minimum, median and maximum singular value of one matrix of a group, by group name.

        Returns:
            Those of an optimizer that orthogonalizes; it may synchronize with the device.
        """
        return {}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a weight or of its state, or a plain tensor itself; it shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(p: torch.Tensor) -> torch.Tensor:
    """Return the gradient of this rank's shard of a parameter that has one."""
    gradient = p.grad
    assert gradient is not None
    if isinstance(p, DTensor) and isinstance(gradient, DTensor) and gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient)
