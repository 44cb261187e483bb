"""Every signal that a launcher may send stops a run with a checkpoint."""

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Tally
from tests.faults.processes import Run, check_history, kill_all
from tests.training.launch import command, losses

SLOW = pytest.mark.slow
ALL = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
TORCHRUN = [*command(2), "--signals-to-handle", ALL]


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGUSR1, 1),
        pytest.param(signal.SIGHUP, 1, marks=SLOW),
        pytest.param(signal.SIGUSR2, 1, marks=SLOW),
        pytest.param(signal.SIGHUP, 2, marks=SLOW),
        pytest.param(signal.SIGUSR1, 2, marks=SLOW),
        pytest.param(signal.SIGUSR2, 2, marks=SLOW),
    ],
)
def test_a_signal_stops_a_run_with_a_checkpoint(
    number: signal.Signals, ranks: int, corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    folder = tmp_path / "run"
    run = Run(corpus, folder, launcher=command(1) if ranks == 1 else TORCHRUN)
    run.wait_for_steps(1)
    run.process.send_signal(number)
    assert run.wait() == (0 if ranks == 1 else 1), run.printed[-4000:]
    assert "stopped by a signal after step" in run.printed
    check_history(folder)
    assert (folder / "checkpoint" / f"step-{losses(folder)[-1][0]}" / ".metadata").exists()
    tally(f"{number.name} to {'a run' if ranks == 1 else 'torchrun'}", "stops with a checkpoint")


@SLOW
@pytest.mark.parametrize(
    "launcher",
    [command(1), [*command(2), "--signals-to-handle", "SIGTERM,SIGINT,SIGQUIT"]],
    ids=["one process", "torchrun"],
)
def test_a_closed_terminal_does_not_stop_a_run_under_nohup(
    launcher: list[str], corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    folder = tmp_path / "run"
    run = Run(corpus, folder, launcher=["nohup", *launcher])
    workers: list[int] = []
    try:
        run.wait_for_steps(1)
        workers = run.workers()
        num_steps = len(losses(folder))
        run.process.send_signal(signal.SIGHUP)
        for worker in workers:
            # a worker has its parent's disposition
            assert sys.platform != "linux" or int(_ignored(worker), 16) & 1
        time.sleep(2)
        run.wait_for_steps(num_steps + 5)
        assert run.process.poll() is None
        tally("SIGHUP under nohup", "the run goes on")
    finally:
        run.kill()
        kill_all(workers)


def _ignored(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("SigIgn"))
