"""Each step is compared with the config that it was trained with, not with that of the last launch."""

import json
from pathlib import Path

import config
from models.run_folder import RunFolder
from tests.training.test_resume import load, write_run
from training.branch import branch_warnings
from training.resume import check_start, describe_finished, resume_warnings
from training.step_configs import step_configs

BATCH, LR = "--training.global_batch_size", "--optimizer.groups.hidden.lr"


def write_launches(folder: Path, *launches: tuple[int, tuple[str, ...]]) -> Path:
    """Write a run with a checkpoint of step 20 whose launches began after these steps, with these words."""
    write_run(folder, *launches[-1][1])
    lines = [
        json.dumps({"step": step, "launch": {"config": config.to_table(load(folder, *words))}})
        for step, words in launches
    ]
    RunFolder(folder).metrics_file.write_text("\n".join(["{damaged", *lines]) + "\n")
    return RunFolder(folder).checkpoint(20)


def test_a_launch_killed_before_its_first_step_made_a_false_warning(tmp_path: Path) -> None:
    write_launches(tmp_path, (0, ()), (20, (BATCH, "64")))
    assert resume_warnings(load(tmp_path), 20) == []
    (warning,) = resume_warnings(load(tmp_path, BATCH, "64"), 20)
    assert "the first 20 steps of" in warning
    assert "training.global_batch_size: saved 32, now 64" in warning


def test_a_killed_launch_of_a_finished_run_made_its_own_config_another(tmp_path: Path) -> None:
    stop = ("--training.stop_at_step", "20")
    write_launches(tmp_path, (0, stop), (20, (LR, "0.5")))
    check_start(load(tmp_path, *stop))
    assert "; optimizer" not in describe_finished(load(tmp_path, *stop), 20)


def test_steps_of_several_launches_are_compared_one_by_one(tmp_path: Path) -> None:
    source = write_launches(tmp_path / "stable", (0, (LR, "0.5")), (8, ()), (12, (BATCH, "64")))
    branch = load(tmp_path / "run", "--checkpoint.start_from", str(source))
    first, last = branch_warnings(branch, source)
    assert first.startswith(f"the first 8 steps before {source} had another config: optimizer.groups.hidden")
    assert "optimizer.groups.hidden.lr: saved 0.5, now 0.01; lr of group hidden at step 1: saved" in first
    assert last.startswith(f"steps 13 to 20 before {source} had another config: training.global_batch_size")
    assert len(resume_warnings(load(tmp_path / "stable", BATCH, "64"), 20)) == 2


def test_steps_that_a_later_launch_repeated_count_as_its_own(tmp_path: Path) -> None:
    write_launches(tmp_path, (0, ()), (8, (LR, "0.5")), (12, (LR, "0.1")), (4, (BATCH, "64")))
    ranges = [(each.first, each.last) for each in step_configs(RunFolder(tmp_path), 20)]
    assert ranges == [(1, 4), (5, 20)]
    # a stop changes no step; a branch's first launch stands for the steps before
    write_launches(tmp_path / "b", (4, ()), (8, ("--training.stop_at_step", "20")))
    ranges = [(each.first, each.last) for each in step_configs(RunFolder(tmp_path / "b"), 20)]
    assert ranges == [(1, 20)]


def test_a_config_edited_by_hand_gave_a_key_error(tmp_path: Path) -> None:
    write_run(tmp_path)
    file = RunFolder(tmp_path).config_file
    for key in ("global_batch_size", "steps", "seq_len"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if not line.startswith(f"{key} = ")))
        run = load(tmp_path, "--training.stop_at_tokens", "100000000")
        check_start(run)
        assert resume_warnings(run, 20) == []
