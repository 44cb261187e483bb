"""What of a member's config may differ from that of its folder, and where a branch begins."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from config import load
from models.run_folder import RunFolder
from tests.eval.report.run_folders import held_out, launch, make_run, step_record
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
        ("diagnostics.every", "5", False),
        ("metrics.tensorboard", "false", False),
        ("training.cuda_graphs", "false", False),
        ("data.prefetch_batches", "1", False),
        ("training.compile", "true", True),
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


@pytest.mark.parametrize(
    ("error", "step", "had_tasks", "is_finished"),
    [
        ("eval.tasks: rank 1: RuntimeError: out of memory", 2, True, True),
        # the plan has got them since: the launch of a finished run leaves its config as it is
        ("eval.tasks: rank 1: RuntimeError: out of memory", 2, False, True),
        ("eval.tasks: rank 1: RuntimeError: out of memory", 1, True, False),
        ("diagnostics: CUDA out of memory; an evaluation failed: eval.tasks: x", 2, True, False),
        ("eval.sample_prompts: CUDA out of memory", 2, True, False),
    ],
)
def test_a_member_without_tasks_has_finished_if_they_failed_after_the_last_step(
    error: str, step: int, *, had_tasks: bool, is_finished: bool, tmp_path: Path
) -> None:
    words = ["--eval.tasks", '["piqa"]'] if had_tasks else []
    records = [launch(), step_record(1, 3.0), step_record(2, 2.0), held_out(2, 2.0)]
    failure = {"step": step, "eval_error": error}
    path = make_run(tmp_path / "run", [*records, failure], "--training.stop_at_step", "2", *words)
    checkpoint = RunFolder(path).checkpoint(2)
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    text = RunFolder(path).config_file
    config = load(RunConfig, text, ["--eval.tasks", '["piqa"]'])
    progress = Records().progress(RunFolder(path), config)
    assert progress.problem is None
    assert progress.is_finished == is_finished


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
