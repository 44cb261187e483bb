"""Records of a run end where its training does."""

from pathlib import Path

import pytest

import config
from eval.report.run_records import read_run
from tests.eval.report.run_folders import make_run
from training.run_config import RunConfig


@pytest.mark.parametrize(
    "words",
    [
        *((), ("--training.stop_at_step", "7"), ("--training.stop_at_step", "99")),
        *(("--training.stop_at_tokens", str(tokens)) for tokens in (1, 256, 257, 10**9)),
        ("--training.stop_at_step", "7", "--training.stop_at_tokens", "1700"),
        ("--training.stop_at_step", "9", "--training.stop_at_tokens", "1700"),
        ("--training.stop_at_step", "99", "--training.stop_at_tokens", str(10**9)),
    ],
)
def test_a_run_ends_where_training_ends_it(words: tuple[str, ...], tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [], *words))
    loaded = config.load(RunConfig, tmp_path / "a" / "config.toml")
    assert run.last_step == loaded.training.last_step
    assert run.batch_tokens == loaded.tokens_per_step
