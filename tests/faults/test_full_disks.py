"""A run on a disk that fills up: a tmpfs of a few MB, where mounting is allowed."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.checkpoint.verify import verify_checkpoint
from models.run_folder import RunFolder
from tests.faults.conftest import Tally
from tests.training.launch import losses, train

CONFIG = "debug_parallax_muon"
WORDS = ("--checkpoint.every", "2", "--checkpoint.keep", "none")
SLOW = pytest.mark.slow
ONE_LINE = "one line, nothing half-written, the checkpoint before is whole"
# a checkpoint of the debug model on one rank has 9.9 MB
CHECKPOINT = 9.9e6


class Disk:
    """A file system of a few MB."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, size: float) -> RunFolder:
        """Mount it with a size in bytes; return the run folder on it."""
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={round(size)}", "none", str(self.path)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
        return RunFolder(self.path / "run")

    def fill(self) -> None:
        """Fill it to the last byte."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A folder to mount a disk on; unmounted afterwards."""
    path = tmp_path / "disk"
    path.mkdir()
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], capture_output=True, check=False)


def error(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


@SLOW
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_training(
    corpus: Path, disk: Disk, tally: Tally
) -> None:
    run = disk.mount(0.8 * CHECKPOINT)
    printed = train(CONFIG, corpus, run.path, *WORDS, code=2)
    assert error(printed).endswith("make room, or give another run.folder")
    assert "has 7.9 MB free, and a checkpoint needs 9.8 MB" in printed
    assert "Traceback" not in printed
    assert not run.path.exists()
    tally("a disk full before the start", ONE_LINE)


def test_a_disk_that_fills_up_ends_the_run_in_one_line(corpus: Path, disk: Disk, tally: Tally) -> None:
    run = disk.mount(1.4 * CHECKPOINT)
    printed = train(CONFIG, corpus, run.path, *WORDS, code=1)
    assert "the 10 checkpoints that this launch adds need 98.0 MB: make room" in printed
    line = error(printed)
    assert "step 4  no checkpoint could be written: no space left on device" in line
    assert "MB are free" in line
    assert "a checkpoint needs 9.8 MB; the newest is step-2" in line
    assert "Traceback" not in printed
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-2"}
    assert [step for step, *_ in losses(run.path)] == [1, 2, 3, 4]
    tally("a disk full before a write", ONE_LINE)


@SLOW
@pytest.mark.parametrize("in_background", ["false", "true"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_during_a_write_keeps_the_checkpoint_before(
    ranks: int, in_background: str, corpus: Path, disk: Disk, tally: Tally
) -> None:
    """There is room for what a checkpoint is estimated at, and not for it with all headers and config."""
    run = disk.mount(19.725e6 if ranks == 1 else 20.21e6)
    words = [*WORDS, "--checkpoint.async_save", in_background]
    printed = train(CONFIG, corpus, run.path, *words, ranks=ranks, code=1)
    line = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert "writing the checkpoint failed: no space left on device" in line
    assert line.endswith("the newest is step-2")
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-2"}
    verify_checkpoint(run.checkpoint(2))
    # with room again, the same command resumes
    shutil.copytree(run.path, disk.path.parent / "roomy")
    words += ["--training.stop_at_step", "4"]
    train(CONFIG, corpus, disk.path.parent / "roomy", *words, ranks=ranks)
    assert [step for step, *_ in losses(disk.path.parent / "roomy")] == [1, 2, 3, 4]
    tally("a disk full within a write", ONE_LINE)


@SLOW
def test_a_full_disk_under_the_metrics_does_not_end_training(corpus: Path, disk: Disk, tally: Tally) -> None:
    run = disk.mount(600_000)
    elsewhere = disk.path.parent / "checkpoints"
    elsewhere.mkdir()
    run.path.mkdir()
    run.checkpoints.symlink_to(elsewhere)

    def fill() -> None:
        while not run.metrics_file.exists() or len(losses(run.path)) < 3:
            time.sleep(0.1)
        disk.fill()

    filler = threading.Thread(target=fill)
    filler.start()
    words = ["--metrics.tensorboard", "true", "--checkpoint.every", "10"]
    printed = train(CONFIG, corpus, run.path, *words)
    filler.join()
    for sink in ("tensorboard", "metrics.jsonl"):
        assert printed.count(f"{sink} ends here and training continues: [Errno 28] No space left") == 1
        tally(f"a disk full under {sink}", "one warning; the run goes on")
    assert "Traceback" not in printed
    assert set(run.whole_checkpoints()) == {10, 20}
    recorded = [step for step, *_ in losses(run.path)]
    assert recorded == list(range(1, len(recorded) + 1))
    assert len(recorded) < 20
    # the gap is reported
    (disk.path / "filler").unlink()
    printed = train(CONFIG, corpus, run.path, "--training.steps", "22")
    assert f"has no record of steps {len(recorded) + 1} to 20, which were trained" in printed
    assert [step for step, *_ in losses(run.path)] == [*recorded, 21, 22]
