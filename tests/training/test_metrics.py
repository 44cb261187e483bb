"""The record and the console's words."""

import json
from pathlib import Path

import pytest

from training.metrics import JsonlWriter, duration, progress_bar


@pytest.mark.parametrize(
    ("seconds", "said"), [(9.4, "9s"), (247, "4m07s"), (11100, "3h05m"), (93600, "1d02h"), (3599.6, "1h00m")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_progress_is_full_at_the_end_and_empty_at_the_start() -> None:
    assert progress_bar(0, 7) == "[" + "." * 20 + "]   0%"
    assert progress_bar(7, 7) == "[" + "#" * 20 + "] 100%"
    assert progress_bar(3, 7).count("#") == 8


def test_a_resumed_record_forgets_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 6):
        writer.write({"step": step, "loss": 0.1 * step})
    writer.close()
    with path.open("a") as file:
        file.write('damaged\n{"step": 2, "lo')  # a fault of the disk, and a kill in the middle of a line
    writer = JsonlWriter(path)
    writer.forget_after(3)
    writer.write({"step": 4, "loss": 7.0})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines[2:]] == [(3, 0.1 * 3), (4, 7.0)]
