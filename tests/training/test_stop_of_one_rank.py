"""A signal that reaches one rank of several stops all of them with one checkpoint."""

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.training.launch import losses, start_long


def worker_pids(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes that torchrun started."""
    statuses = [path.read_text() for path in Path("/proc").glob("[0-9]*/status") if os.access(path, os.R_OK)]
    found = [re.search(rf"^Pid:\t(\d+)\nPPid:\t{process.pid}$", status, re.MULTILINE) for status in statuses]
    return sorted(int(match.group(1)) for match in found if match is not None)


def test_a_signal_to_one_of_two_ranks_stops_both(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_long(corpus, folder, ranks=2)
    workers = worker_pids(process)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed[-4000:]
    assert "stopped by a signal after step" in printed
    step = losses(folder)[-1][0]
    assert (folder / "checkpoint" / f"step-{step}" / ".metadata").exists()
