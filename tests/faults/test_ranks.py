"""Ranks that hang or die: the run ends soon, and one line names them."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.launch import ROOT, arguments, environment, losses

STEP = 5
# a rank is late after the limit, and silent after some writes; the rest is a slow machine
SECONDS = 300


def start(corpus: Path, folder: Path, fault: str, bad_rank: int, *words: str) -> list[subprocess.Popen[str]]:
    """Start two ranks without torchrun, which would end the others as soon as one has."""
    program = ("-m", "tests.faults.ranks", fault, str(STEP), str(bad_rank))
    overrides = ("--data.validation", "none", "--training.stop_at_step", "8", *words)
    command = [
        sys.executable,
        *arguments("debug_softmax_adamw", corpus, folder, *overrides, program=program),
    ]
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = str(unused.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def outcome(ranks: list[subprocess.Popen[str]], bad_rank: int) -> list[str]:
    """Wait until the other rank ends, with code 1 and one line; return both ranks' outputs."""
    try:
        printed = ["", ""]
        printed[1 - bad_rank], _ = ranks[1 - bad_rank].communicate(timeout=SECONDS)
        assert ranks[1 - bad_rank].returncode == 1, printed
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.kill(rank.pid, signal.SIGKILL)
    printed[bad_rank], _ = ranks[bad_rank].communicate(timeout=SECONDS)
    assert "Traceback" not in printed[1 - bad_rank]
    errors = [line for line in "".join(printed).splitlines() if "error: " in line]
    assert len(errors) == 1, printed
    return errors


def test_a_stopped_rank_is_named(corpus: Path, tmp_path: Path) -> None:
    ranks = start(corpus, tmp_path / "run", "stop", 1, "--parallelism.timeout_seconds", "8")
    (line,) = outcome(ranks, bad_rank=1)
    process = f"{socket.gethostname()}, process {ranks[1].pid}"
    assert re.match(rf"error: rank 1 \({process}, last seen in step \d: .+\) stopped answering", line)
    assert "rank 0 has waited for " in line
    assert f"in step {STEP}: " in line
    assert str(tmp_path / "run" / "checkpoint") in line
    assert len(losses(tmp_path / "run")) == STEP - 1


@pytest.mark.slow
def test_a_stopped_rank_that_holds_the_store_is_named(corpus: Path, tmp_path: Path) -> None:
    ranks = start(corpus, tmp_path / "run", "stop", 0, "--parallelism.timeout_seconds", "8")
    (line,) = outcome(ranks, bad_rank=0)
    assert re.search(
        rf"rank 1 has waited for \d+ s in step {STEP}: .*the store on localhost does not answer", line
    )


@pytest.mark.slow
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_that_waits_for_data_is_named_with_its_place(
    bad_rank: int, corpus: Path, tmp_path: Path
) -> None:
    ranks = start(corpus, tmp_path / "run", "data", bad_rank, "--parallelism.timeout_seconds", "8")
    (line,) = outcome(ranks, bad_rank)
    assert f"rank {bad_rank} ({socket.gethostname()}, process {ranks[bad_rank].pid}, " in line
    assert f"last seen in step {STEP}: data at tests/faults/ranks.py:" in line
    assert "did not arrive" in line


@pytest.mark.slow
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_killed_rank_is_named(bad_rank: int, corpus: Path, tmp_path: Path) -> None:
    ranks = start(corpus, tmp_path / "run", "kill", bad_rank)
    (line,) = outcome(ranks, bad_rank)
    host = socket.gethostname()
    assert f"rank {1 - bad_rank} ({host}, process {ranks[1 - bad_rank].pid}) in step {STEP}: " in line
    if bad_rank == 1:  # rank 0 holds the store
        assert f"rank 1 ({host}, process {ranks[1].pid}, last seen in step " in line


@pytest.mark.slow
def test_steps_longer_than_the_limit_are_waited_for(corpus: Path, tmp_path: Path) -> None:
    ranks = start(corpus, tmp_path / "run", "slow", 0, "--parallelism.timeout_seconds", "1")
    for rank in ranks:
        printed, _ = rank.communicate(timeout=SECONDS)
        assert rank.returncode == 0, printed
    assert len(losses(tmp_path / "run")) == 8
