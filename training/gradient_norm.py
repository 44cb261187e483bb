"""The gradient norm of a step: clipping, and spikes, which are far above the norms of the steps before."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from training.run_config import TrainingConfig

WINDOW = 50
"""Steps that the running norm averages over."""
MIN_STEPS = 20
"""The first steps, whose norms vary most, are no spikes."""


class StepNorm(NamedTuple):
    """The gradient norm of a step.

    Attributes:
        norm: Global norm before clipping.
        running: The running norm before the step; 0 in the first.
        is_spike: Whether the norm is more than training.spike_ratio times the running one.
        is_skipped: Whether the step has changed nothing, since it is a spike.
    """

    norm: float
    running: float
    is_spike: bool
    is_skipped: bool

    def metrics(self) -> dict[str, float]:
        """Return the step's metrics, those of a spike only where it is one."""
        metrics = {"grad_norm": self.norm, "grad_norm_running": self.running}
        if self.is_spike:
            metrics |= {"grad_norm_spike": self.norm / self.running, "is_skipped": self.is_skipped}
        return metrics

    def describe_spike(self) -> str:
        """Describe a spike in a line of the log."""
        times = f"{self.norm / self.running:.1f} times the running {self.running:.3g}"
        what = "skipped" if self.is_skipped else "not skipped"
        return f"gradient norm {self.norm:.3g}, {times}: a spike, {what}"


class GradientNorm:
    """Clips gradients and finds spikes, without waiting for the device.

    The running norm is the mean of the first norms, then their moving average. A spike enters it as
    training.spike_ratio times the running norm, so that one spike hides no other and a lasting rise is
    followed. It is part of a checkpoint.

    Args:
        config: The [training] table.
        device: Device of the model.

    Attributes:
        last: What describe() takes, of the last step, `[3]` on the device.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self._max_norm, self._ratio = config.max_grad_norm, config.spike_ratio
        self._skips = config.skip_spikes
        self._running = torch.zeros((), device=device)
        self._num_steps = torch.zeros((), device=device)  # up to WINDOW
        self.last = torch.zeros(3, device=device)  # norm, running norm before, whether it is a spike

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Clip the gradients, and compare their norm with the running one, which then takes it in.

        Args:
            parameters: All of the model's, with gradients, sharded or not.

        Returns:
            1 if the step is to be skipped, since the norm is NaN or Inf or a spike that training.skip_spikes
            skips, else 0: a scalar in fp32, the same on all ranks.
        """
        parameters = list(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm, foreach=True)
        limit = self._ratio * self._running
        is_spike = (self._num_steps >= MIN_STEPS) & (self._running > 0) & (norm > limit)
        is_finite = norm.isfinite()
        torch.stack((norm, self._running, is_spike.float()), out=self.last)
        counted = torch.where(is_spike, limit, norm)
        num_steps = (self._num_steps + 1).clamp(max=WINDOW)
        running = self._running + (counted - self._running) / num_steps
        self._running.copy_(torch.where(is_finite, running, self._running))
        self._num_steps.copy_(torch.where(is_finite, num_steps, self._num_steps))
        return (~is_finite | is_spike if self._skips else ~is_finite).float()

    def describe(self, last: Sequence[float]) -> StepNorm:
        """Return the norm of a step whose `last` was copied to the host."""
        norm, running, is_spike = last
        return StepNorm(norm, running, bool(is_spike), bool(is_spike) and self._skips)

    def state_dict(self) -> dict[str, Any]:
        """Return the running norm, equal on all ranks."""
        return {"running": self._running, "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state from state_dict."""
        self._running.copy_(state_dict["running"])
        self._num_steps.copy_(state_dict["num_steps"])
