"""A run whose checkpoints are damaged: what a resume, an evaluation and `verify` do about it."""

import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from models.checkpoint.metadata import DamagedCheckpointError, read_index
from models.checkpoint.reader import CheckpointReader
from models.run_folder import RunFolder
from tests.faults.conftest import Tally
from tests.training.launch import ROOT, environment, losses, train

CONFIG = "debug_parallax_muon"
WORDS = ("--checkpoint.every", "2", "--checkpoint.keep", "none")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on one rank with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(CONFIG, corpus, folder, *WORDS, "--training.stop_at_step", "6")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    """A copy of the run, to damage."""
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def plant(checkpoint: Path) -> None:
    metadata = read_index(checkpoint).metadata
    metadata.planner_data = Command(checkpoint.parents[2] / "executed")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def swap(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("newest"))
    checkpoint.with_name("step-2").rename(checkpoint)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit_flipped": lambda step: flip(step / "__0_0.distcp", 8 * 3_000_000 + 2),
    "file_cut": lambda step: shorten(step / "__0_0.distcp"),
    "file_missing": lambda step: (step / "__0_0.distcp").unlink(),
    "file_empty": lambda step: empty(step / "__0_0.distcp"),
    "metadata_empty": lambda step: empty(step / ".metadata"),
    "metadata_cut": lambda step: shorten(step / ".metadata"),
    "payload": plant,
    "renamed": swap,
}


def command(*words: str, code: int) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == code, printed[-3000:]
    assert "Traceback" not in printed
    return printed


def check_refused_and_resumed(
    damage: str, run: RunFolder, corpus: Path, finished: Path, ranks: int, tally: Tally
) -> None:
    DAMAGES[damage](run.checkpoint(6))
    words = [*WORDS, "--training.stop_at_step", "8"]
    before = sorted(path.name for path in run.checkpoints.iterdir())
    printed = train(CONFIG, corpus, run.path, *words, ranks=ranks, code=2 if ranks == 1 else 1)
    line = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert str(run.checkpoint(6)) in line
    assert f"{run.checkpoint(4)} is good; set checkpoint.fall_back to true" in line
    assert "Traceback (most" not in printed or ranks > 1  # torchrun's own
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before
    printed = train(CONFIG, corpus, run.path, *words, "--checkpoint.fall_back", "true", ranks=ranks)
    assert "resuming from there (checkpoint.fall_back)" in printed
    assert [step for step, *_ in losses(run.path)] == list(range(1, 9))
    if ranks == 1:
        assert losses(run.path)[:6] == losses(finished)
    assert (run.checkpoints / "step-6.damaged").is_dir()
    assert set(run.whole_checkpoints()) >= {4, 6, 8}
    assert not (run.path.parent / "executed").exists()
    tally(
        f"newest checkpoint: {damage}", "refused in one line; with fall_back the steps of the undamaged run"
    )


@pytest.mark.parametrize(
    "damage", [each if each == "bit_flipped" else pytest.param(each, marks=SLOW) for each in DAMAGES]
)
def test_a_damaged_newest_checkpoint_is_refused_and_fall_back_resumes_before_it(
    damage: str, run: RunFolder, corpus: Path, finished: Path, tally: Tally
) -> None:
    check_refused_and_resumed(damage, run, corpus, finished, 1, tally)


@SLOW
@pytest.mark.parametrize("damage", ["bit_flipped", "file_missing", "metadata_empty"])
def test_two_ranks_refuse_and_fall_back_alike(
    damage: str, run: RunFolder, corpus: Path, finished: Path, tally: Tally
) -> None:
    check_refused_and_resumed(damage, run, corpus, finished, 2, tally)


@SLOW
def test_a_run_without_a_good_checkpoint_does_not_start_over(run: RunFolder, corpus: Path) -> None:
    for path in run.whole_checkpoints().values():
        shorten(path / "__0_0.distcp")
    words = [*WORDS, "--training.stop_at_step", "8", "--checkpoint.fall_back", "true"]
    printed = train(CONFIG, corpus, run.path, *words, code=2)
    assert "no other checkpoint beside it is good" in printed
    assert set(run.whole_checkpoints()) == {2, 4, 6}


def test_verify_prints_a_table_and_exits_with_2_where_there_is_damage(run: RunFolder) -> None:
    flip(run.checkpoint(4) / "__0_0.distcp", 8 * 2_000_000)
    (run.checkpoint(6) / ".metadata").unlink()
    printed = command("-m", "models.checkpoint", "verify", str(run.path), code=2)
    assert printed.count("  good\n") == 1
    assert f"{run.checkpoint(4) / '__0_0.distcp'} is damaged at " in printed
    assert "incomplete: it has no .metadata" in printed
    assert f"2 of 3 checkpoints of {run.path} are damaged: step-4, step-6; the newest good one is" in printed


@pytest.mark.parametrize("num_flips", [60, pytest.param(1000, marks=SLOW)])
def test_no_flipped_bit_of_a_whole_checkpoint_goes_unseen(
    num_flips: int, finished: Path, tally: Tally
) -> None:
    """A flip in a byte that holds no data, such as padding, is harmless; any other is found."""
    checkpoint = RunFolder(finished).checkpoint(6)
    generator, num_found = random.Random(0), 0
    wanted = read(checkpoint)
    files = sorted(checkpoint.iterdir())
    for _ in range(num_flips):
        file = generator.choices(files, [path.stat().st_size for path in files])[0]
        bit = generator.randrange(8 * file.stat().st_size)
        flip(file, bit)
        try:
            found = read(checkpoint)
        except DamagedCheckpointError:
            num_found += 1
        else:
            assert found.keys() == wanted.keys()
            same = (is_equal(found[each], value) for each, value in wanted.items())
            assert all(same), f"bit {bit} of {file.name}"
        flip(file, bit)
        tally("a bit of a run's checkpoint flipped", "not loaded as another number")
    assert num_found > 0.9 * num_flips


def read(checkpoint: Path) -> dict[object, object]:
    values = CheckpointReader(checkpoint).values()
    return {index: value.clone() if isinstance(value, torch.Tensor) else value for index, value in values}


def is_equal(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


@SLOW
def test_no_command_executes_a_payload_in_metadata(run: RunFolder, corpus: Path) -> None:
    plant(run.checkpoint(6))
    text = str(corpus / "validation.parquet")
    command("-m", "models.generation", "--checkpoint", str(run.path), "--prompt", "a", code=2)
    command("-m", "eval.perplexity", "--checkpoint", str(run.path), "--files", text, code=2)
    command("-m", "models.convert", "to-hf", str(run.path), "--out", str(run.path.parent / "hf"), code=2)
    command("-m", "models.checkpoint", "verify", str(run.path), code=2)
    train(CONFIG, corpus, run.path, "--training.stop_at_step", "8", code=2)
    assert not (run.path.parent / "executed").exists()


@SLOW
def test_a_payload_in_the_data_position_is_not_executed(run: RunFolder, corpus: Path) -> None:
    checkpoint, mark = run.checkpoint(6), run.path.parent / "executed"
    dcp_to_torch_save(checkpoint, run.path.parent / "state.pt")
    state = torch.load(run.path.parent / "state.pt", weights_only=False)
    state["dataloader"]["packed_loader"] = Command(mark)
    shutil.rmtree(checkpoint)
    dcp.save(state, checkpoint_id=checkpoint, no_dist=True)
    printed = command("-m", "models.checkpoint", "verify", str(run.path), code=2)
    assert "is damaged at dataloader.packed_loader: it is not plain data" in printed
    printed = train(CONFIG, corpus, run.path, "--training.stop_at_step", "8", code=2)
    assert "is damaged at dataloader.packed_loader: it is not plain data" in printed
    # generation reads the weights alone
    command(
        "-m",
        "models.generation",
        "--checkpoint",
        str(run.path),
        "--prompt",
        "a",
        "--max-new-tokens",
        "2",
        code=0,
    )
    assert not mark.exists()
