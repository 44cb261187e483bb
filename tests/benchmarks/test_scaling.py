"""The runs of a scaling table."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.scaling import Member, measure_all, members


def test_members_have_the_same_rows_per_gpu_or_the_same_batch() -> None:
    listed = members("x.toml", 8, 6)
    pairs = [(each.num_gpus, each.rows, each.replicas) for each in listed]
    assert pairs == [(1, 8, 1), (2, 16, 1), (4, 32, 1), (1, 32, 1), (2, 32, 1), (4, 32, 2)]
    assert members("x.toml", 8, 1) == [Member(config="x.toml", num_gpus=1, rows=8)]


def test_saved_rows_are_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Member] = []

    def measure(member: Member, gpus: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
        measured.append(member)
        return asdict(member) | {"tokens_per_second": float(len(measured))}

    monkeypatch.setattr("benchmarks.scaling.visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr("benchmarks.scaling.measure", measure)
    listed, written = members("x.toml", 8, 2), []
    rows, failed = measure_all(listed, [], written.append, [asdict(listed[0]) | {"tokens_per_second": 7.0}])
    assert not failed
    assert rows[0]["tokens_per_second"] == 7.0
    assert sorted(measured, key=listed.index) == listed[1:]
    assert written[-1] == rows
