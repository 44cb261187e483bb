"""A trainer that reads each step one step late, as on a GPU, records what one on a CPU does."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.launch import losses, records, start_long, train
from training.launched_step import LATE_SECONDS, reads_late

LATE = ("-m", "tests.training.late_reads")
CONFIG = "debug_parallax_muon"
TIMED = {"tokens_per_second", "step_seconds", "data_wait_percent", "seconds", "launch", "task_seconds"}
WORDS = [
    *("--training.steps", "9", "--checkpoint.every", "4", "--checkpoint.async_save", "true"),
    *("--eval.every", "3", "--average.decay", "0.9"),
    *("--metrics.update_every", "1", "--metrics.spectrum_every", "5"),
]


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in each.items() if k not in TIMED} for each in records(folder)]


def test_records_are_those_of_steps_read_at_once(corpus: Path, tmp_path: Path) -> None:
    train(CONFIG, corpus, tmp_path / "plain", *WORDS)
    train(CONFIG, corpus, tmp_path / "late", *WORDS, program=LATE)
    assert untimed(tmp_path / "late") == untimed(tmp_path / "plain")
    # stopped after a step that nothing else makes the trainer read, and resumed
    for words in (["--training.stop_at_step", "5"], []):
        train(CONFIG, corpus, tmp_path / "resumed", *WORDS, *words, program=LATE)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "plain")


def test_two_ranks_record_the_same(corpus: Path, tmp_path: Path) -> None:
    words = [*WORDS, "--training.stop_at_step", "5"]
    train(CONFIG, corpus, tmp_path / "plain", *words, ranks=2)
    train(CONFIG, corpus, tmp_path / "late", *words, ranks=2, program=LATE)
    assert untimed(tmp_path / "late") == untimed(tmp_path / "plain")


def test_a_signal_stops_a_run_whose_steps_are_read_late(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start_long(corpus, folder, program=LATE)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed[-4000:]
    step = losses(folder)[-1][0]
    assert f"stopped by a signal after step {step}" in printed
    # the checkpoint is that of the last step on record
    assert (folder / "checkpoint" / f"step-{step}" / ".metadata").exists()


@pytest.mark.parametrize(("device", "seconds", "late"), [("cpu", 0.1, False), ("cuda", 0.1, True)])
def test_only_short_steps_on_a_gpu_are_read_late(device: str, seconds: float, late: bool) -> None:
    assert reads_late(torch.device(device), seconds) == late
    assert not reads_late(torch.device(device), LATE_SECONDS)
