"""train.py with a rank that hangs or fails: `-m tests.faults.ranks FAULT STEP RANK --config ...`.

In the step the rank is stopped ("stop", SIGSTOP) or killed ("kill", SIGKILL), waits for data without end
("data") or has a GPU out of memory ("memory"). "slow": every step of every rank takes 2 s.
"""

import os
import signal
import sys
import time
from typing import Any

import train
from training import device


def break_rank(fault: str, step: int, rank: int) -> None:
    """Patch the trainer, and shorten the times between two writes of a rank."""
    import torch

    from training import failures, rank_monitor, trainer
    from training.memory import GIB
    from training.micro_batches import MicroBatches
    from training.trainer import Trainer

    rank_monitor.BEAT_SECONDS = 1.0
    rank_monitor.STORE_SECONDS = 5.0
    trainer.DATA_SECONDS = 12.0
    full = failures.MemoryUse(70 * GIB, 71 * GIB, 72.5 * GIB, 0.25 * GIB, 79 * GIB)
    failures.memory_use = lambda: full
    signals = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}
    add, optimizer_step = MicroBatches.add, Trainer.optimizer_step
    hit: list[bool] = []

    def failing_add(self: MicroBatches, *batch: Any) -> None:
        if fault == "slow":
            time.sleep(1.0)  # of two micro-batches
        elif hit and fault in signals:
            # a rank is last seen where it wrote last: on a fast machine five steps are over before it writes
            time.sleep(2 * rank_monitor.BEAT_SECONDS)
            os.kill(os.getpid(), signals[fault])
        elif hit and fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        add(self, *batch)

    def failing_step(self: Trainer, micro_batches: Any) -> Any:
        def hang() -> Any:
            time.sleep(10**6)
            yield

        if self.step == step and int(os.environ["RANK"]) == rank:
            hit.append(True)
        return optimizer_step(self, hang() if hit and fault == "data" else micro_batches)

    MicroBatches.add = failing_add  # pyrefly: ignore [bad-assignment]
    Trainer.optimizer_step = failing_step  # pyrefly: ignore [bad-assignment]


if __name__ == "__main__":
    device.prepare()
    fault, step, rank, *words = sys.argv[1:]
    break_rank(fault, int(step), int(rank))
    os._exit(train.main(words))
