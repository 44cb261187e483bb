"""Hung and dead ranks: who is named, and how a run ends."""

import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed import HashStore

from config import load
from training import rank_monitor
from training.rank_monitor import RankMonitor
from training.rank_states import RankState, describe_hang, find_missing
from training.run_config import RunConfig


def random_states(draw: random.Random, num_ranks: int) -> dict[int, RankState]:
    """States of ranks that all write and wait in the same phase, past its limit."""
    return {
        rank: RankState(
            process=f"node{rank // 8}, process {draw.randrange(10**6)}",
            num_writes=draw.randrange(100),
            num_phases=70,
            phase="step 12: update",
            seconds=130.0,
            limit=120.0,
            place="training/trainer.py:200",
        )
        for rank in range(num_ranks)
    }


def write_again(states: dict[int, RankState], silent: set[int]) -> dict[int, RankState]:
    return {
        rank: state if rank in silent else replace(state, num_writes=state.num_writes + 3)
        for rank, state in states.items()
    }


class _StoreThatIsGone:
    def add(self, *others: Any) -> int:
        raise RuntimeError("Connection reset by peer")


def test_a_rank_whose_store_goes_while_it_reports_says_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(rank_monitor, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(rank_monitor, "_SECONDS_TO_REPORT", 0.0)
    monitor = RankMonitor(load(RunConfig, "configs/debug_softmax_adamw.toml", []))
    monitor._store = HashStore()
    with pytest.raises(SystemExit):
        monitor.fail(lambda: "rank 0 did not arrive")
    # the main thread, whose collective fails as soon as rank 0 has ended
    monitor._store = _StoreThatIsGone()  # pyrefly: ignore [bad-assignment]
    with pytest.raises(SystemExit):
        monitor.fail(lambda: "rank 1 lost a connection")
    assert capsys.readouterr().err == "error: rank 0 did not arrive\n"


@pytest.mark.parametrize("seed", range(30))
def test_the_silent_and_the_late_are_named_and_nobody_else(seed: int) -> None:
    draw = random.Random(seed)
    states = random_states(draw, draw.randrange(3, 40))
    silent = set(draw.sample(range(1, len(states)), draw.randrange(0, 2)))
    late = set(draw.sample(sorted({*states} - silent - {0}), draw.randrange(0 if silent else 1, 2)))
    for rank in late:
        states[rank] = replace(states[rank], num_phases=67, phase="step 12: data", place="data/titan.py:5")
    now = write_again(states, silent)
    assert find_missing(states, now, 0) == (silent, late)
    line = describe_hang(states, now, 0, Path("runs/x/checkpoint"))
    assert line is not None
    assert "\n" not in line
    named = {int(rank) for rank in re.findall(r"rank (\d+) \(", line)}
    assert named == silent | late
    for rank in named:
        assert f"rank {rank} ({states[rank].process}, last seen in {states[rank].phase}" in line
    assert "rank 0 has waited for 130 s in step 12: update (limit 120 s)" in line
    assert "runs/x/checkpoint" in line
    assert "parallelism.timeout_seconds" in line


def test_a_rank_behind_in_a_slow_phase_is_waited_for() -> None:
    states = random_states(random.Random(0), 4)
    states[2] = replace(states[2], num_phases=69, phase="step 11: checkpoint", limit=1800.0)
    assert describe_hang(states, write_again(states, set()), 0, Path("x")) is None
    states[2] = replace(states[2], seconds=1801.0)
    line = describe_hang(states, write_again(states, set()), 0, Path("x"))
    assert line is not None
    assert "rank 2 (node0" in line


def test_ranks_that_all_hang_in_a_phase_are_named_by_place() -> None:
    states = random_states(random.Random(1), 16)
    states[5] = replace(states[5], place="data/loading/stream.py:80")
    line = describe_hang(states, write_again(states, set()), 3, Path("x"))
    assert line is not None
    assert line.startswith(
        "rank 3 has been in step 12: update for 130 s (limit 120 s), as all 16 ranks are: "
    )
    assert "rank 5 at data/loading/stream.py:80, 15 ranks at training/trainer.py:200. " in line


def test_many_missing_ranks_are_counted() -> None:
    states = random_states(random.Random(2), 600)
    line = describe_hang(states, write_again(states, set(range(1, 513))), 0, Path("x"))
    assert line is not None
    assert len(re.findall(r"rank \d+ \(", line)) == 8
    assert "and 504 more stopped answering" in line
    assert len(line) < 1500
