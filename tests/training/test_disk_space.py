"""The space that checkpoints need, at the start of a launch."""

import itertools
import logging
from pathlib import Path

import pytest

import config
from errors import UserError
from models.run_folder import RunFolder, read_run_table
from tests.training.launch import train
from training import disk_space
from training.disk_space import check_space, num_checkpoints
from training.dry_run import dry_run
from training.due import is_due
from training.memory import checkpoint_bytes
from training.preflight import build_meta_model
from training.run_config import RunConfig

CONFIG = Path(__file__).parents[2] / "configs" / "debug_softmax_muon.toml"
MB = 10**6


def load(folder: Path, *words: str) -> RunConfig:
    return config.load(RunConfig, CONFIG, ["--run.folder", str(folder), "--training.steps", "20", *words])


def test_one_checkpoint_more_than_are_kept_exists_at_a_time(tmp_path: Path) -> None:
    every = ("--checkpoint.every", "2")
    assert num_checkpoints(load(tmp_path, "--checkpoint.every", "none")) == 1
    assert num_checkpoints(load(tmp_path, *every, "--checkpoint.keep", "3")) == 4
    assert num_checkpoints(load(tmp_path, *every, "--checkpoint.keep", "none")) == 10
    assert num_checkpoints(load(tmp_path, *every, "--checkpoint.keep", "none"), step=15) == 3
    assert num_checkpoints(load(tmp_path, "--checkpoint.every", "15", "--checkpoint.keep", "3")) == 2


@pytest.mark.parametrize("keep", ["none", "3"])
@pytest.mark.parametrize("start", [0, 7, 12, 19, 20])
def test_every_step_that_saves_is_counted_once(tmp_path: Path, keep: str, start: int) -> None:
    for every, tasks_every in itertools.product((None, 4, 6, 30), (None, 3, 6, 20)):
        words = [f"--checkpoint.every={every or 'none'}", f"--eval.tasks_every={tasks_every or 'none'}"]
        run = load(tmp_path, *words, "--checkpoint.keep", keep, "--eval.tasks", '["lambada_openai"]')
        saves = [s for s in range(start + 1, 21) if s == 20 or is_due(s, every) or is_due(s, tasks_every)]
        wanted = len(saves) if keep == "none" else min(len(saves), 4)
        assert num_checkpoints(run, start) == wanted, (every, tasks_every)


def test_a_branch_writes_no_checkpoints_before_its_start(tmp_path: Path) -> None:
    start = ("--checkpoint.start_from", str(tmp_path / "checkpoint" / "step-12"))
    run = load(tmp_path, *start, "--checkpoint.every", "4", "--checkpoint.keep", "none")
    assert ", up to 2 at a time: " in dry_run(run, 1)


def test_a_tied_weight_is_written_twice(corpus: Path, tmp_path: Path) -> None:
    words = ["--model.vocab_size", "30000", "--model.tie_embeddings", "true", "--training.stop_at_step", "1"]
    train("debug_softmax_adamw", corpus, tmp_path, *words)
    table = read_run_table(RunFolder(tmp_path).checkpoint(1))
    run = config.from_table(RunConfig, table, tmp_path)
    model = build_meta_model(run)
    counts = model.num_parameters()
    assert counts["embedding"] > 0.5 * counts["total"]
    files = RunFolder(tmp_path).checkpoint(1).iterdir()
    written = sum(file.stat().st_size for file in files)
    assert written == pytest.approx(checkpoint_bytes(run, model, 1), rel=0.02)


def test_a_disk_without_room_is_refused_and_one_with_little_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = 9 * MB
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: free)
    run = load(tmp_path, "--checkpoint.every", "2", "--checkpoint.keep", "3")
    with pytest.raises(UserError, match=r"has 9\.0 MB free, and a checkpoint needs 10\.0 MB; make room"):
        check_space(run, 10 * MB)
    free = 39 * MB
    with caplog.at_level(logging.WARNING, "parallax"):
        check_space(run, 10 * MB)
    assert "39.0 MB free, and the 4 checkpoints that this launch adds need 40.0 MB" in caplog.text
    # two exist already: two more are written before any is deleted
    for step in (2, 4):
        RunFolder(tmp_path).checkpoint(step).mkdir(parents=True)
        (RunFolder(tmp_path).checkpoint(step) / ".metadata").touch()
    caplog.clear()
    free = 20 * MB
    check_space(run, 10 * MB)
    assert not caplog.text
    # a finished run writes none
    free = 0
    check_space(load(tmp_path, "--training.stop_at_step", "4"), 10 * MB)


def test_the_dry_run_prints_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    run = load(tmp_path, "--checkpoint.every", "2", "--checkpoint.keep", "3")
    size = checkpoint_bytes(run, build_meta_model(run), 1)
    line = next(line for line in dry_run(run, 1).splitlines() if line.startswith("checkpoint "))
    assert (
        line.split(maxsplit=1)[1] == f"{size / MB:.1f} MB, up to 4 at a time: {4 * size / MB:.1f} MB of disk"
    )
