"""train.py with gradients a thousand times as large in step 22.

Prints for every rank whether that step changed weights, optimizer state or their average.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import train
from optimizers.base import local, local_gradient
from training import device

SPIKE = 22


def _state(trainer: Any) -> list[torch.Tensor]:
    state = [value for o in trainer.optimizers for values in o.state.values() for value in values.values()]
    tensors = [*trainer.model.parameters(), *state, *trainer.average.state_dict().values()]
    return [local(t).detach().clone() for t in tensors]


def spike() -> None:
    """Patch the trainer with the gradients and the comparison."""
    from training.gradient_norm import GradientNorm
    from training.launched_step import LaunchedStep
    from training.trainer import Trainer

    clip, optimizer_step = GradientNorm.clip, Trainer.optimizer_step
    steps: list[int] = []

    def spiked_clip(self: GradientNorm, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        parameters = list(parameters)
        for parameter in parameters if steps[-1] == SPIKE else ():
            local_gradient(parameter).mul_(1000.0)
        return clip(self, parameters)

    def compared_step(self: Trainer, *batches: Any) -> LaunchedStep:
        steps.append(self.step)
        before = _state(self)
        launched = optimizer_step(self, *batches)
        if self.step == SPIKE:
            same = all(torch.equal(a, b) for a, b in zip(before, _state(self), strict=True))
            rank = os.environ.get("RANK", "0")
            print(f"rank {rank}: {'unchanged' if same else 'changed'} in step {SPIKE}", flush=True)
        return launched

    GradientNorm.clip, Trainer.optimizer_step = spiked_clip, compared_step  # pyrefly: ignore [bad-assignment]


if __name__ == "__main__":
    device.prepare()
    spike()
    sys.exit(train.main(sys.argv[1:]))
