"""torchtitan's checkpoints: our own folders alone are counted, and a failed background write ends no run."""

import shutil
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager

from models.run_folder import RunFolder
from training.log import logger


class RunCheckpoints(CheckpointManager):
    """Writes, finds and deletes the checkpoints of a run."""

    save_future: Future | None = None  # close() may come before there is one
    _step: int

    @property
    def _run(self) -> RunFolder:
        return RunFolder(Path(self.folder).parent)

    def newest_step(self) -> int | None:
        """The newest step that rank 0 finds, the same on every rank; every rank calls this."""
        found = [max(self._run.whole_checkpoints(), default=None) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Write a checkpoint, in the background with async_save.

        Args:
            curr_step: The step that it comes after.
            last_step: Return when it is written, in any case; also done after a failed background write.
        """
        is_settled = self.settle()
        super().save(curr_step, last_step=last_step or not is_settled)
        self._step = curr_step
        if self.save_future is None:
            self._written()
        else:
            logger.info(f"step {curr_step}  checkpoint being written in the background")

    @property
    def is_background_done(self) -> bool:
        """Whether this rank's background write has ended and settle() has not spoken of it yet."""
        return self.save_future is not None and self.save_future.done()

    def settle(self) -> bool:
        """Wait for the background write, if there is one, and say how it went; every rank calls this.

        Returns:
            False if it failed on any rank. What it left is gone, and another checkpoint is due at once.
        """
        if self.save_future is None:
            return True
        reason = self._failure(self.save_future)
        self.save_future = None
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason, group=self.pg)
        failures = [text for text in reasons if text is not None]
        if not failures:
            self._written()
            return True
        if dist.get_rank() == 0:
            logger.warning(
                f"step {self._step}  its checkpoint could not be written in the background: {failures[0]}; "
                "training waits for another one"
            )
            # it takes room, which may be what was missing
            shutil.rmtree(self._create_checkpoint_id(self._step), ignore_errors=True)
        return False

    def close(self) -> None:
        """Wait for the background write and for deletions; a failure is said, not raised."""
        if self.save_future is not None:
            # ranks may come here alone, on their way out with an error
            reason = self._failure(self.save_future)
            self.save_future = None
            if reason is None:
                self._written()
            else:
                logger.error(f"step {self._step}  its checkpoint could not be written: {reason}")
        super().close()

    def _failure(self, write: Future) -> str | None:
        error = write.exception()
        # torch's CheckpointException holds a traceback, with the error in its last line
        return None if error is None else (str(error).strip().splitlines() or [repr(error)])[-1]

    def _written(self) -> None:
        logger.info(f"step {self._step}  checkpoint written")
        self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        """Delete all but the newest whole checkpoints; torchtitan would count any name with step-N in it."""
        if self.purge_thread is not None and dist.get_rank() == 0:
            whole = self._run.whole_checkpoints()
            for step in sorted(whole)[: -self.keep_latest_k]:
                self.purge_queue.put(str(whole[step]))
