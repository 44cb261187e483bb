"""What of a member's config may differ from that of its folder, and where a branch begins."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from config import load
from models.run_folder import RunFolder
from tests.training.sweep.plans import observe, rates, run, write_plan
from training.run_config import RunConfig
from training.sweep.processes import MemberProcess
from training.sweep.records import Records, read_failure
from training.sweep.slots import Slot
from training.sweep.table import format_table

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


def test_a_long_reason_hid_that_a_member_had_failed(tmp_path: Path) -> None:
    for index, text in enumerate(("x" * 100, "x" * 3990, "x" * 20000, "\U0001f600" * 5000)):
        folder = RunFolder(tmp_path / str(index))
        program = f"import sys; print('error: ' + {text!r}); sys.exit(2)"
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        member = MemberProcess(folder, [sys.executable, "-c", program], Slot(0, ()), environment)
        assert member.wait() == 2
        assert member.poll() == 2
        failure = read_failure(folder)
        assert failure is not None
        assert failure.startswith("failed with code 2: ")


def test_a_collected_member_was_trained_again_for_tasks_that_came_later(tmp_path: Path) -> None:
    path = write_plan(tmp_path, rates([0.01]))
    run(path)
    text = path.read_text()
    path.write_text(text.replace("\n[set.model", '\neval.tasks = ["lambada_openai"]\n\n[set.model', 1))
    # the checkpoint is here: the launch evaluates it
    assert [status.state for status in observe(path).look().own] == ["stopped"] * 2
    for folder in (tmp_path / "plan").glob("*/*/checkpoint"):
        shutil.rmtree(folder)
    overview = observe(path).look()
    assert [status.state for status in overview.own] == ["finished"] * 2
    assert format_table(observe(path).plan, overview, 1).count("no results of eval.tasks") == 2
