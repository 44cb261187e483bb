"""A sweep whose members are trained by a stand-in for train.py, which starts in a fraction of a second.

`-m tests.training.sweep.stand_in PLAN ...` is the sweep; `--config FILE` is the stand-in: losses that follow
from rate and seed, a checkpoint after each step, a resume that repeats nothing. A rate of 1 or more fails.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import config
from data.folder_lock import FolderLock, LockedError
from errors import RunError, UserError, run_command
from models.run_folder import RunFolder, is_whole, metadata_file, step_of
from training.run_config import RunConfig
from training.signals import StopRequest

STEP_SECONDS = 0.02


def loss(run: RunConfig, step: int) -> float:
    """A loss with its minimum at a rate of 0.01, by attention and seed."""
    rate = run.optimizer.groups["hidden"].lr
    place = (math.log10(rate) + 2.0) ** 2 + 0.1 * run.run.seed
    return place + (0.5 if run.model.attention.kind == "softmax" else 0.0) + 10.0 / (1 + step)


def train(words: list[str]) -> None:
    """Train a run as train.py does, without a model."""
    run = config.load(RunConfig, words[words.index("--config") + 1])
    folder = RunFolder(Path(run.run.folder))
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder.lock_file)
    try:
        lock.acquire()
    except LockedError as holder:
        raise UserError(f"run.folder is in use by {holder}") from holder
    stop = StopRequest()
    stop.install()
    folder.write_config(run)
    newest = folder.newest_checkpoint()
    start = Path(run.checkpoint.start_from) if newest is None and run.checkpoint.start_from else newest
    if start is not None and not is_whole(start):
        raise UserError(f"checkpoint.start_from is {start}, but there is no such folder")
    first = 0 if start is None else step_of(start) or 0
    lines = folder.metrics_file.read_text().splitlines() if folder.metrics_file.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
    folder.metrics_file.write_text("".join(f"{line}\n" for line in kept))
    if run.optimizer.groups["hidden"].lr >= 1:
        raise RunError("step 1: the loss is nan")
    with folder.metrics_file.open("a") as metrics:

        def record(**fields: object) -> None:
            print(json.dumps(fields), file=metrics, flush=True)

        record(
            step=first,
            launch={
                "num_ranks": 1,
                "device": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
                "flops_per_token": 1.0,
            },
        )
        for step in range(first + 1, run.training.last_step + 1):
            time.sleep(STEP_SECONDS)
            tokens = step * run.tokens_per_step
            record(
                step=step,
                loss=loss(run, step),
                grad_norm=1.0,
                tokens=tokens,
                step_seconds=3600.0,
                time=time.time(),
            )
            folder.checkpoint(step).mkdir(parents=True, exist_ok=True)
            metadata_file(folder.checkpoint(step)).touch()
            if stop.requested:
                break
        else:
            last = run.training.last_step
            record(step=last, validation_loss=loss(run, last), validation_tokens=1)
    lock.release()


def main(words: list[str]) -> None:
    """Be the sweep, or the stand-in."""
    if "--config" in words:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(run_command(lambda: train(words)))
    from training.sweep import __main__, processes

    processes._TRAIN = Path(__file__)  # pyrefly: ignore [bad-assignment]
    sys.exit(run_command(lambda: __main__.main(words)))


if __name__ == "__main__":
    main(sys.argv[1:])
