"""Checkpoints: which are kept and loaded, failed writes, and a run folder that ranks do not share."""

import shutil
from pathlib import Path

import pytest

from tests.training.launch import losses, train

PROGRAM = ("-m", "tests.training.failing_storage")


@pytest.fixture(scope="module")
def failed_write(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 5 steps on two ranks, with a background write of a checkpoint per step, and its output.

    The write after step 2 fails on rank 1.
    """
    folder = tmp_path_factory.mktemp("failed_write") / "run"
    words = ["--checkpoint.every", "1", "--checkpoint.async_save", "true", "--checkpoint.keep", "2"]
    words += ["--training.stop_at_step", "5"]
    return folder, train("debug_softmax_adamw", corpus, folder, *words, ranks=2, program=(*PROGRAM, "write"))


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoint").iterdir()}


def test_a_failed_background_write_is_logged_and_followed_by_a_blocking_write(
    failed_write: tuple[Path, str],
) -> None:
    folder, printed = failed_write
    assert "Traceback" not in printed
    logged = [line.split(maxsplit=1)[1] for line in printed.splitlines() if "checkpoint" in line]
    # "written" is logged after the write
    assert logged[0] == "step 1  writing a checkpoint in the background"
    assert logged[1] == "step 1  checkpoint written"
    assert logged[2] == "step 2  writing a checkpoint in the background"
    assert logged[3].startswith(
        "step 2  writing the checkpoint in the background failed: OSError: [Errno 28]"
    )
    assert logged[4] == "step 3  checkpoint written"
    assert [step for step, *_ in losses(folder)] == [1, 2, 3, 4, 5]


def test_no_more_checkpoints_than_keep_remain(failed_write: tuple[Path, str]) -> None:
    assert names(failed_write[0]) == {"step-4", "step-5"}


def test_renamed_checkpoints_are_neither_deleted_nor_loaded(
    failed_write: tuple[Path, str], corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(failed_write[0], folder)
    checkpoints = folder / "checkpoint"
    (checkpoints / "step-5").rename(checkpoints / "bad-step-5")
    shutil.copytree(checkpoints / "step-4", checkpoints / "step-4.before-lr-change")
    (checkpoints / "step-notes").mkdir()
    words = ["--checkpoint.every", "1", "--checkpoint.keep", "2", "--training.stop_at_step", "6"]
    train("debug_softmax_adamw", corpus, folder, *words)
    assert [step for step, *_ in losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert names(folder) == {"bad-step-5", "step-4.before-lr-change", "step-notes", "step-5", "step-6"}


def test_a_run_folder_that_ranks_do_not_share_is_refused(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--training.stop_at_step", "1"]
    printed = train(
        "debug_softmax_adamw", corpus, folder, *words, ranks=2, code=1, program=(*PROGRAM, "folder")
    )
    assert f"error: run.folder ({folder}) must be on a file system that all nodes share" in printed
    assert "rank 1 does not see" in printed
    assert not list(folder.glob("checkpoint/*"))
    assert not list(folder.glob(".shared-*"))
