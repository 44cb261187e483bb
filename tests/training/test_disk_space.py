"""The space that checkpoints need, at the start of a launch."""

import logging
from pathlib import Path

import pytest

import config
from errors import UserError
from models.run_folder import RunFolder
from training import disk_space
from training.disk_space import check_space, num_checkpoints
from training.dry_run import dry_run
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
