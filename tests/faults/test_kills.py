"""Runs and preparations that are killed at random moments end as if they had not been."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import make_text
from tests.faults.conftest import Tally
from tests.faults.processes import CONFIG, LONG, Run, check_history, num_steps
from tests.training.launch import ROOT, command, environment, losses, train

SYNC = ("--checkpoint.every", "1", "--checkpoint.keep", "2")
ASYNC = (*SYNC, "--checkpoint.async_save", "true")


def kill_once(run: Run, generator: random.Random) -> None:
    """Kill a launch while it starts, or within its first steps, each of which ends with a checkpoint."""
    if generator.random() < 0.25:
        time.sleep(generator.uniform(0, 8))
    else:
        run.wait_for_steps(1)
        time.sleep(generator.uniform(0, 1.5))
    # a worker, or the only process
    workers = run.workers()
    victim = generator.choice(workers) if workers else run.process.pid
    os.kill(victim, signal.SIGKILL)
    assert run.wait() == (1 if workers else -signal.SIGKILL), run.printed[-4000:]


@pytest.mark.parametrize(
    ("words", "ranks", "num_kills"),
    [
        pytest.param(SYNC, 1, 1, id="short"),
        pytest.param(SYNC, 1, 12, id="sync", marks=pytest.mark.slow),
        pytest.param(ASYNC, 1, 12, id="async", marks=pytest.mark.slow),
        pytest.param(SYNC, 2, 4, id="one of two ranks, sync", marks=pytest.mark.slow),
        pytest.param(ASYNC, 2, 4, id="one of two ranks, async", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_is_equal_to_an_uninterrupted_one(
    words: tuple[str, ...], ranks: int, num_kills: int, corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    generator, folder = random.Random(f"{words} {ranks}"), tmp_path / "run"
    for _ in range(num_kills):
        kill_once(Run(corpus, folder, *words, launcher=command(ranks)), generator)
    last = ("--training.stop_at_step", str(num_steps(folder) + 2))
    train(CONFIG, corpus, folder, *LONG, *words, *last, ranks=ranks)
    check_history(folder)
    train(CONFIG, corpus, tmp_path / "other", *LONG, *last, ranks=ranks)
    assert losses(folder) == losses(tmp_path / "other")
    kind = "asynchronous" if words is ASYNC else "synchronous"
    whom = "the process" if ranks == 1 else "one of two ranks"
    for _ in range(num_kills):
        tally(f"kill -9 of {whom} in training, {kind} checkpoints", "equal to an uninterrupted run")


def prepare(source: Path, corpus: Path, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "data.shards", "prepare", "--files", str(source)),
            *("--tokenizer", str(corpus), "--out", str(folder)),
            *("--shard-tokens", "20000", "--processes", "1"),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for_new_shards(process: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    """Wait for shards that this process has written, or for its end."""
    deadline, num_before = time.monotonic() + 240, len(list(folder.glob("shards/*")))
    while len(list(folder.glob("shards/*"))) < num_before + count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("num_kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_preparation_writes_the_same_bytes(
    num_kills: int, corpus: Path, tmp_path: Path, tally: Tally
) -> None:
    generator, source = random.Random(num_kills), tmp_path / "text.jsonl"
    texts = [make_text(seed, 400) for seed in range(40)]
    source.write_text("".join(json.dumps({"text": f"{n} {texts[n % 40]}"}) + "\n" for n in range(3000)))
    assert prepare(source, corpus, tmp_path / "whole").wait(timeout=240) == 0
    folder, num_left = tmp_path / "killed", num_kills
    while num_left:
        process = prepare(source, corpus, folder)
        # 0 is a kill at any time of the start
        wait_for_new_shards(process, folder, generator.randint(0, 3))
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        if process.wait() == 0:  # it was faster
            assert contents(folder) == contents(tmp_path / "whole")
            shutil.rmtree(folder)
        else:
            num_left -= 1
    assert prepare(source, corpus, folder).wait(timeout=240) == 0
    assert contents(folder) == contents(tmp_path / "whole")
    for _ in range(num_kills):
        tally("kill -9 of data.shards prepare", "the same bytes")
