"""A launch waits for ranks of the launch before, whose main rank has died."""

import fcntl
import threading
import time
from pathlib import Path

import pytest

from errors import UserError
from models.run_folder import RunFolder
from training import run_lock
from training.run_lock import RunLock


def test_a_rank_that_lives_on_keeps_the_next_launch_from_deleting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    RunLock(folder).release()
    with folder.ranks_lock_file.open("r+") as rank:
        fcntl.flock(rank, fcntl.LOCK_SH)
        monkeypatch.setattr(run_lock, "RANKS_SECONDS", 0.2)
        with pytest.raises(UserError, match=r"ranks of an earlier launch still have .*ranks\.lock open"):
            RunLock(folder)
        monkeypatch.setattr(run_lock, "RANKS_SECONDS", 60.0)
        timer = threading.Timer(1.5, fcntl.flock, (rank, fcntl.LOCK_UN))
        timer.start()
        began = time.monotonic()
        lock = RunLock(folder)
        assert time.monotonic() - began >= 1.0
        timer.join()
    lock.confirm()
    with pytest.raises(UserError, match=r"run\.folder \(.*run\) is in use by process \d+ on .*, since 20"):
        RunLock(folder)
    lock.release()
    RunLock(folder).release()
