"""Whether the disk under a run folder has room for the checkpoints of a run."""

import math
import os
from pathlib import Path

from disk import format_bytes, free_bytes
from errors import UserError
from models.run_folder import RunFolder
from training.branch_step import branch_step
from training.log import logger
from training.run_config import RunConfig


def num_checkpoints(config: RunConfig, step: int = 0) -> int:
    """Return how many checkpoints a run has at a time, at most: one is written before the oldest is deleted.

    Args:
        config: The run.
        step: Step that it starts or resumes from.
    """
    saves = _num_saves(config, step)
    return saves if config.checkpoint.keep is None else min(saves, config.checkpoint.keep + 1)


def _num_saves(config: RunConfig, step: int) -> int:
    """Return the number of later steps with a checkpoint: due, before tasks, or the last one."""
    last = config.training.last_step
    if last <= step:
        return 0
    tasks_every = config.eval.tasks_every if config.eval.tasks else None
    intervals = {every for every in (config.checkpoint.every, tasks_every) if every is not None}
    both = {math.lcm(*intervals)} if len(intervals) == 2 else set()

    def count(interval: int) -> int:
        return last // interval - step // interval

    is_last_due = any(last % interval == 0 for interval in intervals)
    return sum(map(count, intervals)) - sum(map(count, both)) + (not is_last_due)


def check_space(config: RunConfig, checkpoint_bytes: int) -> None:
    """Check the free space for the checkpoints of a launch; warns where it suffices for some of them only.

    Args:
        config: The run.
        checkpoint_bytes: From training.memory.checkpoint_bytes.

    Raises:
        UserError: There is no room for one checkpoint.
    """
    run = RunFolder(Path(config.run.folder))
    whole = run.whole_checkpoints()
    step = max(whole, default=branch_step(config))
    if step >= config.training.last_step:
        return
    free = free_bytes(run.checkpoints)
    if free < checkpoint_bytes:
        raise UserError(
            f"run.folder ({run.path}) has {format_bytes(free)} free, and a checkpoint needs "
            f"{format_bytes(checkpoint_bytes)}; make room, or give another run.folder"
        )
    wanted = num_checkpoints(config, step)
    if config.checkpoint.keep is not None:
        wanted = min(wanted, max(1, config.checkpoint.keep + 1 - len(whole)))
    if free < wanted * checkpoint_bytes and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"run.folder ({run.path}) has {format_bytes(free)} free, and the {wanted} checkpoints that this "
            f"launch adds need {format_bytes(wanted * checkpoint_bytes)}: make room, or lower checkpoint.keep"
        )
