"""What of a member's config may differ from that of its folder, and where a branch begins."""

from pathlib import Path

import pytest

from config import load
from models.run_folder import RunFolder
from training.run_config import RunConfig
from training.sweep.records import Records

CONFIG = "configs/debug_softmax_muon.toml"


@pytest.mark.parametrize(
    ("word", "value", "problem"),
    [
        ("checkpoint.every", "7", False),
        ("checkpoint.keep", "5", False),
        ("eval.every", "9", False),
        ("training.seq_len", "128", True),
        ("checkpoint.initial_weights", "runs/x", True),
    ],
)
def test_keys_that_change_nothing_that_is_trained_may_differ(
    word: str, value: str, problem: bool, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(load(RunConfig, CONFIG, ["--run.folder", str(tmp_path)]))
    config = load(RunConfig, CONFIG, ["--run.folder", str(tmp_path), f"--{word}", value])
    found = Records().progress(folder, config).problem
    assert (found is not None and word in found) == problem, found


def test_a_branch_begins_at_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    words = ["--checkpoint.start_from", "runs/plan/stable/x/checkpoint/step-30"]
    progress = Records().progress(RunFolder(tmp_path / "none"), load(RunConfig, CONFIG, words))
    assert (progress.first_step, progress.step) == (30, 0)
