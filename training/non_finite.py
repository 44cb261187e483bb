"""Stop a run whose loss, gradient or weights are NaN or Inf."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from errors import RunError
from models.run_folder import RunFolder


class NonFiniteLossError(RunError):
    """The loss, the gradient norm or a weight is NaN or Inf."""


def check_step(step: int, loss: float, grad_norm: float, folder: RunFolder) -> None:
    """Raise if the loss or the gradient norm of a step is NaN or Inf.

    Args:
        step: The step.
        loss: Loss in nats/token over the global batch.
        grad_norm: Global gradient norm.
        folder: The run folder, for the message.

    Raises:
        NonFiniteLossError: With the remedy.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteLossError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped without saving. The newest "
            f"checkpoint in {folder.checkpoints} is the last good state; resume from it with a lower "
            "learning rate or training.max_grad_norm. If the run stops at the same step again, delete "
            "that checkpoint and resume from the one before"
        )


def check_weights(step: int, model: nn.Module) -> None:
    """Raise if a weight is NaN or Inf; a collective call for a sharded model.

    Args:
        step: Completed optimizer steps, for the message.
        model: The model.

    Raises:
        NonFiniteLossError: With the remedy.
    """
    norm = torch.nn.utils.get_total_norm(model.parameters(), foreach=True)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not norm.isfinite():
        raise NonFiniteLossError(
            f"step {step}: the norm of the weights is {float(norm)}; stopped without saving. Resume from the "
            "previous checkpoint with a lower learning rate"
        )
