"""torchtitan's checkpoint manager for the layout of our run folders.

Failed background writes are retried in the foreground; a failed write there ends the run, leaves nothing of
itself, and says how much space there is.
"""

import os
import shutil
import time
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import CheckpointManager

from disk import format_bytes, free_bytes
from errors import RunError
from eval.distributed import run_on_main_rank
from models.run_folder import RunFolder
from training.log import logger
from training.titan import delete_in_background

# the deletion of the oldest checkpoint may be under way
_SECONDS_TO_DELETE = 10.0


class CheckpointWriteError(RunError):
    """A checkpoint could not be written; the one before is the newest."""


class RunCheckpoints(CheckpointManager):
    """Writes and deletes the checkpoints of a run.

    Attributes:
        checkpoint_bytes: What a checkpoint needs on disk, over all ranks.
    """

    checkpoint_bytes: int = 0
    save_future: Future | None = None  # close() may be called before torchtitan sets it
    _saved_step: int

    @property
    def _run_folder(self) -> RunFolder:
        return RunFolder(Path(self.folder).parent)

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Write a checkpoint, in the background with async_save; a collective call.

        Args:
            curr_step: Number of completed optimizer steps.
            last_step: Wait until it is written. A checkpoint that replaces a failed background write is never
                written in the background.

        Raises:
            CheckpointWriteError: On all ranks: the disk is full, or the write failed otherwise.
        """
        succeeded = self.finish_background_write()
        problem = run_on_main_rank(lambda: self._prepare(curr_step))
        if problem is not None:
            raise CheckpointWriteError(problem)
        try:
            super().save(curr_step, last_step=last_step or not succeeded)
        except CheckpointException as error:
            reason = _last_line(error)
            raise CheckpointWriteError(
                run_on_main_rank(lambda: self._discard(curr_step, reason, ""))
            ) from None
        self._saved_step = curr_step
        if self.save_future is None:
            self._finish_save()
        else:
            logger.info(f"step {curr_step}  writing a checkpoint in the background")

    @property
    def has_finished_write(self) -> bool:
        """Whether this rank's background write is done and finish_background_write is yet to be called."""
        return self.save_future is not None and self.save_future.done()

    def finish_background_write(self) -> bool:
        """Wait for the background write, if any, and log its result; a collective call.

        Returns:
            False if it failed on any rank: its folder is deleted and another checkpoint is due at once.
        """
        if self.save_future is None:
            return True
        reason = self._failure_reason(self.save_future)
        self.save_future = None
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason, group=self.pg)
        failures = [each for each in reasons if each is not None]
        if not failures:
            self._finish_save()
            return True
        if dist.get_rank() == 0:
            problem = self._discard(self._saved_step, failures[0], "in the background ")
            logger.warning(f"{problem}; writing another one in the foreground")
        return False

    def close(self) -> None:
        """Wait for the background write and for deletions; logs a failure and does not raise it."""
        if self.save_future is not None:
            # not a collective call: after an error only some ranks close
            reason = self._failure_reason(self.save_future)
            self.save_future = None
            if reason is None:
                self._finish_save()
            else:
                logger.error(f"step {self._saved_step}  writing the checkpoint failed: {reason}")
        super().close()

    def _failure_reason(self, write: Future) -> str | None:
        error = write.exception()
        return None if error is None else _last_line(error)

    def _prepare(self, step: int) -> str | None:
        """Make way for a checkpoint on the main rank; return why it cannot be written, if so."""
        path = self._run_folder.checkpoint(step)
        if os.path.lexists(path):
            name = self._run_folder.set_aside(path, "old").name
            logger.warning(f"{path} is in the way of a checkpoint: renamed it to {name}")
        deadline = time.monotonic() + _SECONDS_TO_DELETE
        while (free := free_bytes(path)) < self.checkpoint_bytes:
            if self.purge_thread is None or time.monotonic() > deadline:
                return self._describe(step, "no checkpoint could be written: no space left on device", free)
            time.sleep(0.2)
        return None

    def _discard(self, step: int, reason: str, where: str) -> str:
        """Delete what a failed write has left, on the main rank; return a line about the failure."""
        path = self._run_folder.checkpoint(step)
        shutil.rmtree(path, ignore_errors=True)
        free = free_bytes(path)
        if free < 1.1 * self.checkpoint_bytes:  # headers take some, and torch masks the system's error
            reason = "no space left on device"
        return self._describe(step, f"writing the checkpoint {where}failed: {reason}", free)

    def _describe(self, step: int, problem: str, free: int) -> str:
        newest = self._run_folder.newest_checkpoint()
        return (
            f"step {step}  {problem}; {format_bytes(free)} are free in {self.folder}, a checkpoint needs "
            f"{format_bytes(self.checkpoint_bytes)}; the newest is {newest.name if newest else 'none'}"
        )

    def _finish_save(self) -> None:
        logger.info(f"step {self._saved_step}  checkpoint written")
        self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        """Delete all but the newest whole checkpoints; torchtitan's counts any name that contains step-N."""
        if self.purge_thread is not None and dist.get_rank() == 0:
            whole = self._run_folder.whole_checkpoints()
            delete_in_background(self, (whole[step] for step in sorted(whole)[: -self.keep_latest_k]))


def _last_line(error: BaseException) -> str:
    """Return the last line of an error: torch's CheckpointException holds a traceback, which it ends."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]
