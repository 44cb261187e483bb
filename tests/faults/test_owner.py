"""Two launches in one run folder, and workers whose torchrun has died."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Tally
from tests.faults.processes import CONFIG, LONG, Run, check_history, is_alive, kill_all, seconds_until_end
from tests.training.launch import ROOT, arguments, command, environment, losses, train

SLOW = pytest.mark.slow


def test_a_second_launch_is_refused_and_the_workers_of_a_killed_torchrun_end_with_a_checkpoint(
    corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    folder = tmp_path / "run"
    run = Run(corpus, folder, launcher=command(2))
    run.wait_for_steps(1)
    workers = run.workers()
    try:
        before = (folder / "config.toml").read_bytes()
        printed = train(CONFIG, corpus, folder, *LONG, "--training.max_grad_norm", "0.5", code=2)
        (line,) = [line for line in printed.splitlines() if "error" in line]
        holder = rf"process {workers[0]} on {socket.gethostname()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.search(rf"run\.folder \({folder}\) is in use by {holder}", line)
        assert (folder / "config.toml").read_bytes() == before
        tally("second launch in one run folder", "refused in one line; the first goes on")
        run.kill()
        assert seconds_until_end(workers, limit=60) < 60
        assert f"torchrun (process {run.process.pid}) has ended without its workers" in run.printed
        assert "stopped by the end of torchrun after step" in run.printed, run.printed[-4000:]
        tally("kill -9 of torchrun", "its workers write a checkpoint and end within 60 s")
    finally:
        run.kill()
        kill_all(workers)
    check_history(folder)
    assert (folder / "checkpoint" / f"step-{losses(folder)[-1][0]}" / ".metadata").exists()


@SLOW
@pytest.mark.parametrize("ranks", [1, 2])
def test_of_two_launches_at_the_same_time_one_trains(
    ranks: int, corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    folder = tmp_path / "run"
    for _ in range(3):
        words = ("--training.stop_at_step", str(len(losses(folder)) + 40 if folder.exists() else 40))
        runs = [Run(corpus, folder, *words, launcher=command(ranks)) for _ in range(2)]
        codes = sorted(run.wait() for run in runs)
        refused = 2 if ranks == 1 else 1
        # the later one may also find that the other has finished
        assert codes in ([0, refused], [0, 0]), "".join(run.printed[-4000:] for run in runs)
        if codes[1]:
            assert any("is in use by process" in run.printed for run in runs)
            tally("two launches at the same time", "one trains, the other is refused")
    check_history(folder)


@SLOW
def test_all_ranks_of_a_second_launch_are_told(corpus: Path, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "run"
    run = Run(corpus, folder, launcher=command(1))
    try:
        run.wait_for_steps(1)
        printed = train(CONFIG, corpus, folder, *LONG, ranks=2, code=1)
        assert "is in use by process" in printed
        tally("second launch in one run folder", "refused in one line; the first goes on")
        run.wait_for_steps(len(losses(folder)) + 5)
    finally:
        run.kill()


@SLOW
def test_the_tasks_of_a_slurm_step_train_one_run(corpus: Path, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "run"
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    words = ("--training.stop_at_step", "3")
    runs = [
        Run(
            corpus,
            folder,
            *words,
            launcher=command(1),
            variables={**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
        )
        for rank in ("0", "1")
    ]
    assert [run.wait() for run in runs] == [0, 0], "".join(run.printed[-4000:] for run in runs)
    train(CONFIG, corpus, tmp_path / "torchrun", *LONG, *words, ranks=2)
    assert losses(folder) == losses(tmp_path / "torchrun")
    tally("two tasks of a SLURM step without torchrun", "two ranks of one run")


@SLOW
def test_a_port_that_is_taken_is_one_line(corpus: Path, tmp_path: Path, tally: Tally) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        run = Run(corpus, tmp_path / "run", launcher=command(1), variables={**variables, "MASTER_PORT": port})
        assert run.wait() == 1
    (line,) = run.printed.splitlines()[-1:]
    assert line.startswith(f"error: rank 0 did not find all 2 ranks at localhost:{port} (")
    assert line.endswith("start all of them, or set another MASTER_ADDR or MASTER_PORT")
    assert "Traceback" not in run.printed
    assert not (tmp_path / "run").exists()
    tally("main port in use", "one line with the address")


@SLOW
def test_a_worker_that_waits_for_a_stopped_one_ends_after_torchrun(
    corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    run = Run(corpus, tmp_path / "run", launcher=command(2))
    run.wait_for_steps(1)
    workers = run.workers()
    try:
        os.kill(workers[1], signal.SIGSTOP)
        time.sleep(1)
        run.kill()
        assert seconds_until_end(workers[:1], limit=75) < 60
        os.kill(workers[1], signal.SIGCONT)
        seconds_until_end(workers, limit=75)
        tally("kill -9 of torchrun while a rank is stopped", "the ranks end within 60 s")
    finally:
        kill_all(workers)


@SLOW
def test_a_run_outlives_the_shell_that_started_it(corpus: Path, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "run"
    words = " ".join(f"'{word}'" for word in arguments(CONFIG, corpus, folder, *LONG))
    with (tmp_path / "printed.txt").open("w") as output:
        shell = subprocess.run(
            ["sh", "-c", f"{sys.executable} {words} & echo $! > {tmp_path / 'pid'}; kill -9 $$"],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    assert shell.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    try:
        deadline = time.monotonic() + 240
        while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 5:
            assert is_alive(pid), (tmp_path / "printed.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)
        seconds_until_end([pid], limit=120)
    finally:
        kill_all([pid])
    assert "stopped by a signal after step" in (tmp_path / "printed.txt").read_text()
    tally("kill -9 of the shell that started a run", "the run goes on")
