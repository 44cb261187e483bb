"""train.py with a gradient of NaN in step 3 on the last rank, while the loss stays finite.

Prints for every rank whether that step changed weights, optimizer state or step counters.
"""

import math
import os
import sys
from typing import Any

import torch

import train
from optimizers.base import local, local_gradient
from training import device

BAD_STEP = 3


def _state(trainer: Any) -> list[torch.Tensor]:
    state = [value for o in trainer.optimizers for values in o.state.values() for value in values.values()]
    tensors = [*trainer.model.parameters(), *state]
    return [local(t).detach().clone() for t in tensors]


def poison() -> None:
    """Patch the trainer with the gradient and the comparison."""
    from training.launched_step import LaunchedStep
    from training.micro_batches import MicroBatches
    from training.trainer import Trainer

    rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
    add, optimizer_step = MicroBatches.add, Trainer.optimizer_step
    steps: list[int] = []

    def poisoned_add(self: MicroBatches, *batch: Any) -> None:
        add(self, *batch)
        if steps[-1] == BAD_STEP and rank == last:
            for parameter in self.model.parameters():
                local_gradient(parameter).mul_(math.nan)

    def compared_step(self: Trainer, *batches: Any) -> LaunchedStep:
        steps.append(self.step)
        before = _state(self)
        launched = optimizer_step(self, *batches)
        if self.step == BAD_STEP:
            same = all(torch.equal(a, b) for a, b in zip(before, _state(self), strict=True))
            print(f"rank {rank}: {len(before)} tensors are {'unchanged' if same else 'changed'}", flush=True)
        return launched

    MicroBatches.add, Trainer.optimizer_step = poisoned_add, compared_step  # pyrefly: ignore [bad-assignment]


if __name__ == "__main__":
    device.prepare()
    poison()
    sys.exit(train.main(sys.argv[1:]))
