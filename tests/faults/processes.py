"""Start runs whose processes are killed, and look at what they left."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from models.run_folder import RunFolder
from tests.training.launch import ROOT, arguments, environment, losses

CONFIG = "debug_parallax_muon"
LONG = ("--training.steps", "100000", "--data.validation", "none")
SECONDS = 240.0
"""Patience with slow machines."""


class Run:
    """A process that trains in a folder, with its output in a file, since its workers may outlive it.

    Args:
        corpus: Folder of the fixture.
        folder: Run folder.
        words: Further overrides.
        launcher: Words before "train.py", such as those of torchrun.
        variables: Further environment variables; None removes one.
    """

    def __init__(
        self,
        corpus: Path,
        folder: Path,
        *words: str,
        launcher: Sequence[str],
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._num_before = num_steps(folder)
        self._output = folder.parent / f"{folder.name}-{time.monotonic_ns()}.txt"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, *arguments(CONFIG, corpus, folder, *LONG, *words)],
                cwd=ROOT,
                env={**environment(), **(variables or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        """What the run has printed."""
        return self._output.read_text()

    def wait_for_steps(self, count: int) -> None:
        """Wait until this launch has taken some steps."""
        self.wait_until(lambda: num_steps(self.folder) >= self._num_before + count)

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Wait for a condition while the process lives."""
        deadline = time.monotonic() + SECONDS
        while not is_reached():
            assert self.process.poll() is None, self.printed[-4000:]
            assert time.monotonic() < deadline, self.printed[-4000:]
            time.sleep(0.05)

    def wait(self) -> int:
        """Wait for the process's end; return its exit code."""
        return self.process.wait(timeout=SECONDS)

    def kill(self) -> None:
        """Kill the process; not those that it started."""
        self.process.kill()
        self.process.wait()

    def workers(self) -> list[int]:
        """Return the processes that torchrun has started, by rank."""
        listed = {int(path.name): path for path in Path("/proc").glob("[0-9]*")}
        found = {}
        for pid, path in listed.items():
            try:
                is_child = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == self.process.pid
                variables = (path / "environ").read_bytes().split(b"\0") if is_child else []
            except OSError:
                continue
            found.update({int(v[5:]): pid for v in variables if v.startswith(b"RANK=")})
        return [found[rank] for rank in sorted(found)]


def num_steps(folder: Path) -> int:
    """Return how many records of steps a run's metrics.jsonl has; a line that is being written counts."""
    path = folder / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def seconds_until_end(pids: Sequence[int], *, limit: float) -> float:
    """Wait until processes have ended; return the seconds that it took."""
    began = time.monotonic()
    while any(map(is_alive, pids)):
        assert time.monotonic() - began < limit, f"{[pid for pid in pids if is_alive(pid)]} live on"
        time.sleep(0.1)
    return time.monotonic() - began


def kill_all(pids: Sequence[int]) -> None:
    """Kill the processes that are left of a run."""
    for pid in filter(is_alive, pids):
        os.kill(pid, 9)


def check_history(folder: Path) -> None:
    """Check that the record has each step once, in order, and that every checkpoint left is whole."""
    assert [step for step, *_ in losses(folder)] == list(range(1, len(losses(folder)) + 1))
    run = RunFolder(folder)
    assert run.whole_checkpoints()
    assert run.step_folders() == run.whole_checkpoints()
