"""One launch per run folder: the main rank holds the folder's lock, and the other ranks share a second one.

The lock is taken before anything in the folder is written or deleted, and a refusal is raised on all ranks.
The second lock keeps a launch from deleting what a rank of the launch before, whose main rank has died, is
still writing.
"""

import fcntl
import os
import time
from collections.abc import Callable

from data.folder_lock import FolderLock, LockedError, try_flock
from errors import UserError
from eval.distributed import is_main_rank, run_on_main_rank
from models.run_folder import RunFolder
from training.log import logger

RANKS_SECONDS = 70.0
"""How long a launch waits for ranks of the launch before, which end within a minute of their torchrun."""
_POLL_SECONDS = 0.5


class RunLock:
    """The lock of a run folder; the constructor is a collective call.

    Args:
        folder: The run folder; created if it is missing.

    Raises:
        UserError: On all ranks: another launch uses the folder; names its host, process and time.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lock = FolderLock(folder.lock_file)
        self._ranks_fd: int | None = None
        run_on_main_rank(self._acquire)

    def confirm(self) -> None:
        """Check that no other launch has started at the same time, and lock the folder on the other ranks.

        A collective call, before the first write, once all ranks see the folder (check_shared).

        Raises:
            UserError: On all ranks: the folder is another launch's, on a file system whose flock does not
                reach its host.
        """
        run_on_main_rank(lambda: self._refuse(self._lock.confirm))
        if not is_main_rank():
            self._ranks_fd = self._open_ranks()
            try_flock(self._ranks_fd, fcntl.LOCK_SH)

    def release(self) -> None:
        """Release the lock, once this rank writes nothing more."""
        self._lock.release()
        self._close_ranks()

    def _acquire(self) -> None:
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._refuse(self._lock.acquire)
        self._wait_for_ranks()

    def _refuse(self, check: Callable[[], None]) -> None:
        try:
            check()
        except LockedError as holder:
            raise UserError(
                f"run.folder ({self._folder.path}) is in use by {holder}: two launches in one folder would "
                "destroy each other's checkpoints; stop that one or wait for its end, or give this run "
                "another run.folder"
            ) from holder

    def _wait_for_ranks(self) -> None:
        """Wait until no rank of an earlier launch lives."""
        fd, deadline, is_said = self._open_ranks(), time.monotonic() + RANKS_SECONDS, False
        try:
            while try_flock(fd, fcntl.LOCK_EX) is False:
                if time.monotonic() > deadline:
                    self._lock.release()
                    raise UserError(
                        f"ranks of an earlier launch still have {self._folder.ranks_lock_file} open, though "
                        "its main rank has ended: end these processes, or give this run another run.folder"
                    )
                if not is_said:
                    logger.info(f"waiting for ranks of the launch before to end, up to {RANKS_SECONDS:.0f} s")
                is_said = True
                time.sleep(_POLL_SECONDS)
        finally:
            os.close(fd)

    def _open_ranks(self) -> int:
        fd = os.open(self._folder.ranks_lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.register_at_fork(after_in_child=self._close_ranks)
        return fd

    def _close_ranks(self) -> None:
        fd, self._ranks_fd = self._ranks_fd, None
        if fd is not None:
            os.close(fd)
