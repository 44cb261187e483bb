"""train.py with gradients a thousand times as large in step 22.

Prints for every rank whether that step changed weights, optimizer state or their average.
"""

import os
import sys
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import train
from training import device

SPIKE = 22


def _state(trainer: Any) -> list[torch.Tensor]:
    state = [value for o in trainer.optimizers for values in o.state.values() for value in values.values()]
    tensors = [*trainer.model.parameters(), *state, *trainer.average.state_dict().values()]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def spike() -> None:
    """Patch the trainer with the gradients and the comparison."""
    from training.micro_batches import MicroBatches
    from training.trainer import StepResult, Trainer

    loss, optimizer_step = MicroBatches.loss, Trainer.optimizer_step
    steps: list[int] = []

    def spiked_loss(self: MicroBatches) -> torch.Tensor:
        for parameter in self.model.parameters() if steps[-1] == SPIKE else ():
            assert isinstance(parameter.grad, DTensor)
            parameter.grad.to_local().mul_(1000.0)
        return loss(self)

    def compared_step(self: Trainer, *batches: Any) -> StepResult:
        steps.append(self.step)
        before = _state(self)
        result = optimizer_step(self, *batches)
        if self.step == SPIKE:
            same = all(torch.equal(a, b) for a, b in zip(before, _state(self), strict=True))
            rank = os.environ.get("RANK", "0")
            print(f"rank {rank}: {'unchanged' if same else 'changed'} in step {SPIKE}", flush=True)
        return result

    MicroBatches.loss, Trainer.optimizer_step = spiked_loss, compared_step  # pyrefly: ignore [bad-assignment]


if __name__ == "__main__":
    device.prepare()
    spike()
    sys.exit(train.main(sys.argv[1:]))
