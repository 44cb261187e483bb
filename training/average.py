"""An exponential moving average of the weights, kept during training ([average])."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from models.qwen3 import Qwen3
from optimizers.base import local
from training.run_config import AverageConfig


class WeightAverage:
    """The average of a model's weights, in fp32 and sharded as they are.

    After each step it is decay * average + (1 - decay) * weights; up to average.start_step it equals the
    weights. A checkpoint has it as "average.<parameter>".

    Args:
        model: The model, sharded and on its device; its weights are fp32.
        config: The [average] table.
        decay: Its decay.
    """

    def __init__(self, model: Qwen3, config: AverageConfig, decay: float) -> None:
        self._start_step, self._decay = config.start_step, decay
        # the shards: once gathered for an evaluation, the model has other parameters
        self._weights: dict[str, torch.Tensor] = {**model.unwrapped_parameters()}
        self._averages = {name: torch.zeros_like(weight) for name, weight in self._weights.items()}
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._is_loaded = False

    def has_started(self, step: int) -> bool:
        """Return whether the average after a step may differ from the weights."""
        return step > self._start_step

    @torch.no_grad()
    def begin(self, step: int) -> bool:
        """Start with the weights of a launch, unless a checkpoint had an average.

        Args:
            step: Completed optimizer steps.

        Returns:
            Whether the average was loaded.
        """
        if not (self._is_loaded and self.has_started(step)):
            torch._foreach_copy_(self._local(self._averages), self._local(self._weights))
        return self._is_loaded

    @torch.no_grad()
    def update(self, step: int, *, is_skipped: torch.Tensor) -> None:
        """Take in the weights after a step.

        Args:
            step: The step.
            is_skipped: 1 if the step has left the weights as they were, else 0: an fp32 scalar on the device.
        """
        averages, weights = self._local(self._averages), self._local(self._weights)
        if not self.has_started(step):
            torch._foreach_copy_(averages, weights)
        else:
            weight = (1.0 - self._decay) * (1.0 - is_skipped)
            torch._foreach_lerp_(averages, weights, [weight] * len(weights))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Exchange the weights of the model with the average, and back at the end, without a changed bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Any]:
        """Return the average by the weights' names, sharded as they are."""
        return dict(self._averages)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state from state_dict."""
        for name, average in self._averages.items():
            average.copy_(state_dict[name])
        self._is_loaded = True

    @torch.no_grad()
    def _exchange(self) -> None:
        # an evaluation leaves weights gathered, and the next forward would not gather the others
        for module in self._sharded_modules:
            module.reshard()
        for weight, average in zip(self._local(self._weights), self._local(self._averages), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @staticmethod
    def _local(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [local(tensor) for tensor in tensors.values()]
