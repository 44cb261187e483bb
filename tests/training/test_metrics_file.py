"""metrics.jsonl under full disks and missing records."""

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest

from training.metrics_file import JsonlWriter


class NearlyFull(io.FileIO):
    """A file on a disk with room for some bytes more."""

    room = 25

    def write(self, data: Any, /) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = super().write(memoryview(data)[: self.room])
        self.room -= count
        return count


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_part_of_itself(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 1, "loss": 0.5})
    writer._file = NearlyFull(writer.path, "a")
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            writer.write({"step": step, "loss": 0.123456789})
    assert writer.path.read_text() == '{"step": 1, "loss": 0.5}\n'
    # nothing comes later from a buffer
    writer.close()
    assert [json.loads(line)["step"] for line in writer.path.read_text().splitlines()] == [1]


def test_steps_without_a_record_are_found(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    assert writer.missing_steps(1, 0) == []
    assert writer.missing_steps(1, 9) == [(1, 9)]
    for step in (3, 4, 6):
        writer.write({"step": step, "loss": 1.0})
    writer.write({"step": 5, "held_out_loss": 1.0})
    assert writer.missing_steps(1, 8) == [(1, 2), (5, 5), (7, 8)]
    assert writer.missing_steps(3, 4) == []
