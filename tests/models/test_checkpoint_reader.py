"""The reader of checkpoints: no damage is loaded as other numbers, and nothing in one is executed."""

import io
import json
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from models.checkpoint.archive import check_archive, decode
from models.checkpoint.load import load_state
from models.checkpoint.metadata import DamagedCheckpointError, read_index
from models.checkpoint.reader import CheckpointReader
from models.checkpoint.verify import newest_good, verify_checkpoint
from models.run_folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(seed: int, step: int = 3) -> dict[str, Any]:
    """A small state of every kind that training saves: tensors of four dtypes, numbers and a text."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(6, 4, generator=generator),
        "gain": torch.randn(5, generator=generator).bfloat16(),
        "optimizer": {"momentum": torch.randn(6, 4, generator=generator), "step": torch.tensor(float(seed))},
        "train_state": {"step": step, "tokens": seed, "rng": torch.arange(16, dtype=torch.uint8)},
        "dataloader": {"packed_loader": json.dumps({"row": seed})},
    }


def write(run: Path, step: int = 3, seed: int = 0) -> Path:
    path = RunFolder(run).checkpoint(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    dcp.save(state(seed, step), checkpoint_id=path, no_dist=True)
    return path


def load(checkpoint: Path) -> dict[str, Any]:
    loaded = state(1, step=0)
    load_state(loaded, checkpoint)
    return loaded


def is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    checkpoint = write(tmp_path)
    assert is_equal(load(checkpoint), state(0))
    assert verify_checkpoint(checkpoint).num_entries == 8


@pytest.mark.parametrize("value", [torch.arange(8.0) ** 2, 7], ids=["tensor", "int"])
def test_no_bit_of_an_entry_changes_what_is_read(value: Any) -> None:
    """Every bit; one in the attributes of a record made torch return uninitialized memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data, num_refused = buffer.getvalue(), 0
    for bit in range(8 * len(data)):
        flipped = flip(data, bit)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                view = memoryview(bytearray(flipped))
                read = decode(view, check_archive(view))
        except Exception:  # of many kinds
            num_refused += 1
            continue
        assert is_equal(read, value), f"bit {bit}"
    assert num_refused > len(data)


@pytest.mark.parametrize("num_flips", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_bit_of_a_checkpoint_changes_what_is_loaded(num_flips: int, tmp_path: Path) -> None:
    """Random bits of .metadata and of the tensors' file, equally often."""
    checkpoint, wanted = write(tmp_path), state(0)
    generator, lines = random.Random(0), list[str]()
    for file in (checkpoint / ".metadata", checkpoint / "__0_0.distcp"):
        good = file.read_bytes()
        for _ in range(num_flips // 2):
            bit = generator.randrange(8 * len(good))
            file.write_bytes(flip(good, bit))
            try:
                loaded = load(checkpoint)
            except DamagedCheckpointError as error:
                lines.append(str(error))
            else:
                assert is_equal(loaded, wanted), f"bit {bit} of {file.name}"
        file.write_bytes(good)
    assert all(str(checkpoint) in line and "\n" not in line for line in lines)
    assert len(lines) > num_flips / 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "file cut": lambda step: cut(step / "__0_0.distcp"),
    "file missing": lambda step: (step / "__0_0.distcp").unlink(),
    "file of zeros": lambda step: zero(step / "__0_0.distcp"),
    "file empty": lambda step: put(step / "__0_0.distcp", b""),
    "metadata empty": lambda step: put(step / ".metadata", b""),
    "metadata cut": lambda step: cut(step / ".metadata"),
    "metadata of zeros": lambda step: zero(step / ".metadata"),
    "metadata is a number": lambda step: put(step / ".metadata", pickle.dumps(3)),
    "metadata of another checkpoint": lambda step: put(
        step / ".metadata", (step.parent / "step-1" / ".metadata").read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda name: name.replace(" ", "_"))
def test_damage_is_named_in_one_line_with_the_good_checkpoint(damage: str, tmp_path: Path) -> None:
    good, newest = write(tmp_path, 2), write(tmp_path, 3)
    other = {"weight": torch.zeros(2)}
    dcp.save(other, checkpoint_id=RunFolder(tmp_path).checkpoint(1), no_dist=True)
    DAMAGES[damage](newest)
    with pytest.raises(DamagedCheckpointError) as error:
        load(newest)
    assert str(newest) in str(error.value)
    assert f"{good} is good" in str(error.value)
    assert error.value.good == good
    assert len(str(error.value).splitlines()) == 1
    cut(good / "__0_0.distcp")
    assert newest_good(newest) == RunFolder(tmp_path).checkpoint(1)


def test_a_renamed_checkpoint_is_not_that_of_its_name(tmp_path: Path) -> None:
    renamed = write(tmp_path, 9).rename(RunFolder(tmp_path).checkpoint(11))
    with pytest.raises(DamagedCheckpointError, match="is a checkpoint of step 9; rename the folder back"):
        CheckpointReader(renamed)
    # a name of the user's own says nothing of the step
    assert CheckpointReader(renamed.rename(renamed.with_name("best"))).index.items


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_payload_in_metadata_is_not_executed(tmp_path: Path) -> None:
    checkpoint, mark = write(tmp_path), tmp_path / "executed"
    metadata = read_index(checkpoint).metadata
    metadata.planner_data = Command(mark)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match=r"it names \w+\.system, which no checkpoint needs"):
        load(checkpoint)
    assert not mark.exists()


def test_a_payload_in_an_entry_is_not_executed(tmp_path: Path) -> None:
    path, mark = RunFolder(tmp_path).checkpoint(3), tmp_path / "executed"
    path.parent.mkdir(parents=True)
    with_payload = state(0)
    with_payload["dataloader"]["packed_loader"] = Command(mark)
    dcp.save(with_payload, checkpoint_id=path, no_dist=True)
    with pytest.raises(DamagedCheckpointError, match=r"at dataloader.packed_loader: it is not plain data"):
        load(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../step-2/__0_0.distcp", "/etc/passwd", "sub/__0_0.distcp", ".."])
def test_metadata_reads_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    write(tmp_path, 2)
    checkpoint = write(tmp_path, 3)
    data = (checkpoint / ".metadata").read_bytes()
    wanted = b"\x8c\x0c__0_0.distcp"
    assert wanted in data
    renamed = b"\x8c" + bytes([len(name)]) + name.encode()
    # a frame's length covers the name: pickles without frames are as valid
    unframed = data[:2] + data[11:] if data[2:3] == b"\x95" else data
    (checkpoint / ".metadata").write_bytes(unframed.replace(wanted, renamed))
    with pytest.raises(DamagedCheckpointError, match=r"is no file of it"):
        CheckpointReader(checkpoint)


def test_odd_names_are_reported_and_ignored(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write(tmp_path, 2)
    (run.checkpoints / "step-7").symlink_to("nowhere")
    (run.checkpoints / "step-5").write_text("a file")
    (run.checkpoints / "step-0012").mkdir()
    (run.checkpoints / "step-4.before").mkdir()
    named = [Path(line.split(" ")[0]).name for line in run.odd_names()]
    assert named == ["step-0012", "step-5", "step-7"]
    assert set(run.step_folders()) == set(run.whole_checkpoints()) == {2}
    assert run.set_aside(run.checkpoints / "step-7", "old").name == "step-7.old"
    (run.checkpoints / "step-7").write_text("")
    assert run.set_aside(run.checkpoints / "step-7", "old").name == "step-7.old2"
