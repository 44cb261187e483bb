"""A trained plan of two attentions, two rates and two seeds: kills and several folders change nothing."""

import csv
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from eval.report.plan_report import write_plan_report
from tests.training.sweep.plans import rates, run, start, write_plan
from tests.training.sweep.test_queue import all_losses, holders

PLAN = rates([0.005, 0.02], seeds=[0, 1])
# two processes on two cores
HEAD = 'baseline = "debug_softmax_muon"\nmembers_per_gpu = 2'
NUM_KILLS = 3


def kill(path: Path, words: list[str], folder: Path, generator: random.Random, log: Path) -> None:
    """Start a sweep, and kill -9 it at a random moment, half of the time with its members."""
    sweep = start(path, *words, log=log)
    time.sleep(generator.uniform(2, 7))  # a member imports for as long
    assert sweep.poll() is None, log.read_text()
    is_alone = generator.random() < 0.5
    for pid in [sweep.pid, *([] if is_alone else holders(folder))]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    sweep.wait()


def tables(folder: Path, out: Path) -> dict[str, list[list[str]]]:
    """Every table of the plan's report, but for times and folders."""
    write_plan_report(folder, out=out)
    found = {}
    for path in sorted(out.rglob("*.csv")):
        lines = list(csv.reader(path.read_text().splitlines()))
        if path.stem != "cost":
            lines[0] = [heading.partition(" in /")[0] for heading in lines[0]]
            kept = [index for index, heading in enumerate(lines[0]) if heading != "GPU-hours"]
            found[str(path.relative_to(out))] = [[line[index] for index in kept] for line in lines]
    return found


def page(path: Path) -> str:
    """Return a report without its title and times; the table of runs, with times, is compared by `tables`."""
    text = path.read_text().split("\n", 1)[1].split("## Runs")[0]
    return re.sub(r"[\d.e-]+ GPU-hours", "GPU-hours", text)


def check_equal(folder: Path, alone: Path, tmp_path: Path) -> None:
    assert all_losses(folder) == all_losses(alone)
    ours, theirs = tables(folder, tmp_path / "ours"), tables(alone, tmp_path / "theirs")
    assert ours == theirs
    assert {"stages.csv", "rates/results.csv", "rates/differences.csv"} <= ours.keys()
    ours, theirs = (page(tmp_path / name / "report.md") for name in ("ours", "theirs"))
    assert ours == theirs
    assert "* Nothing." in ours


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plan, and its folder, run without a fault."""
    folder = tmp_path_factory.mktemp("alone")
    path = write_plan(folder, PLAN, corpus=corpus, head=HEAD)
    run(path, stand_in=False)
    return path, folder / "plan"


def test_killed_sweeps_in_two_folders_brought_together_equal_one_left_alone(
    alone: tuple[Path, Path], tmp_path: Path
) -> None:
    path, expected = alone
    generator = random.Random(7)
    parts = {"a": ["0", "3", "5", "6"], "b": ["1", "2", "4", "7"]}
    kills = [generator.choice([*parts]) for _ in range(NUM_KILLS)]
    for name, numbers in parts.items():
        words = ["--folder", str(tmp_path / name), "--member", *numbers]
        for _ in range(kills.count(name)):
            kill(path, words, tmp_path / name, generator, tmp_path / "killed.txt")
        run(path, *words, stand_in=False)
    together = tmp_path / "together"
    # only one of the folders: the rest is missing
    run(path, "--folder", str(together), "--collect", str(tmp_path / "a"))
    partly = write_plan_report(together, out=tmp_path / "partly").read_text()
    assert partly.count("no training steps") == len(parts["b"])
    run(path, "--folder", str(together), "--collect", *(str(tmp_path / name) for name in parts))
    assert not list(together.rglob("checkpoint"))
    check_equal(together, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_sweep_equals_one_left_alone(seed: int, alone: tuple[Path, Path], tmp_path: Path) -> None:
    path, expected = alone
    generator = random.Random(seed)
    folder = tmp_path / "killed"
    for _ in range(NUM_KILLS):
        kill(path, ["--folder", str(folder)], folder, generator, tmp_path / "killed.txt")
    run(path, "--folder", str(folder), stand_in=False)
    check_equal(folder, expected, tmp_path)
