"""torchtitan's checkpoint manager for the layout of our run folders; failed background writes are retried."""

import shutil
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager

from models.run_folder import RunFolder
from training.log import logger
from training.titan import delete_in_background


class RunCheckpoints(CheckpointManager):
    """Writes and deletes the checkpoints of a run."""

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
        """
        succeeded = self.finish_background_write()
        super().save(curr_step, last_step=last_step or not succeeded)
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
            logger.warning(
                f"step {self._saved_step}  writing the checkpoint in the background failed: {failures[0]}; "
                "writing another one in the foreground"
            )
            # the disk may be full
            shutil.rmtree(self._run_folder.checkpoint(self._saved_step), ignore_errors=True)
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
        # torch's CheckpointException holds a traceback, whose last line is the error
        return None if error is None else (str(error).strip().splitlines() or [repr(error)])[-1]

    def _finish_save(self) -> None:
        logger.info(f"step {self._saved_step}  checkpoint written")
        self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        """Delete all but the newest whole checkpoints; torchtitan's counts any name that contains step-N."""
        if self.purge_thread is not None and dist.get_rank() == 0:
            whole = self._run_folder.whole_checkpoints()
            delete_in_background(self, (whole[step] for step in sorted(whole)[: -self.keep_latest_k]))
