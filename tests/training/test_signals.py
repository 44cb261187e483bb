"""Which signals ask a run to stop, which insist, and what the end of torchrun does; without training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.launch import ROOT, environment

PROGRAM = """
import sys, time
from training import signals
signals.GRACE_SECONDS, signals.ORPHAN_SECONDS, signals._POLL_SECONDS = 0.2, float(sys.argv[1]), 0.05
stop = signals.StopRequest()
stop.watch_torchrun()
stop.install()
print("ready", flush=True)
while True:
    if stop.requested:
        print("stopped", stop.cause, flush=True)
        if len(sys.argv) > 2:
            break
    time.sleep(0.05)
"""
ASKING = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def start(*words: str, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*launcher, sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # the tests themselves may run under nohup
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert read_line(process) == "ready"
    return process


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_that_asks_never_exits(number: signal.Signals) -> None:
    process = start("60")
    try:
        for each in (number, *ASKING):
            process.send_signal(each)
            assert read_line(process) == "stopped by a signal"
            time.sleep(0.3)
            assert process.poll() is None
        # SLURM's SIGTERM at the time limit, after its SIGUSR1, leaves the checkpoint its time
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        process.kill()


def test_a_sighup_that_is_ignored_at_the_start_stays_ignored() -> None:
    process = start("60", "once", launcher=("nohup",))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


def start_from_parent(tmp_path: Path, seconds: str, *words: str, **variables: str) -> int:
    """Start the program from a parent that is killed; return its process id."""
    output, program = tmp_path / "printed.txt", tmp_path / "program.py"
    program.write_text(PROGRAM)
    output.touch()
    command = f"{sys.executable} {program} {seconds} {' '.join(words)} > {output} & echo $!; wait"
    parent = subprocess.Popen(
        ["sh", "-c", command],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pid = int(read_line(parent))
    deadline = time.monotonic() + 60
    while "ready" not in output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "stopped" not in output.read_text()
    parent.kill()
    parent.wait()
    return pid


def ends(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_worker_stops_when_torchrun_has_ended(tmp_path: Path) -> None:
    pid = start_from_parent(tmp_path, "60", "once", TORCHELASTIC_RUN_ID="none")
    assert ends(pid, 20)
    assert "stopped by the end of torchrun" in (tmp_path / "printed.txt").read_text()


def test_a_worker_that_does_not_stop_is_ended(tmp_path: Path) -> None:
    pid = start_from_parent(tmp_path, "0.5", TORCHELASTIC_RUN_ID="none")
    assert ends(pid, 20)


def test_a_process_of_a_shell_outlives_it(tmp_path: Path) -> None:
    pid = start_from_parent(tmp_path, "0.1", "once")
    try:
        assert not ends(pid, 1.0)
        assert "stopped" not in (tmp_path / "printed.txt").read_text()
    finally:
        os.kill(pid, signal.SIGKILL)
