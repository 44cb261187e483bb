"""Files are replaced whole or not at all, and a full disk is said in one line."""

import errno
import os
import re
from pathlib import Path

import pytest

import disk
from disk import DiskFullError, format_bytes, free_bytes, replacing, write_text


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the rename of an unsynced file leaves an empty one."""
    calls: list[str] = []
    sync, rename = os.fsync, os.replace

    def recorded_sync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(disk.os, "fsync", recorded_sync)
    monkeypatch.setattr(disk.os, "replace", recorded_rename)
    write_text(tmp_path / "config.toml", "a = 1\n")
    assert re.fullmatch(r"config\.toml\.\w+\.tmp", calls[0])
    assert calls[1:] == ["rename", tmp_path.name]
    assert (tmp_path / "config.toml").read_text() == "a = 1\n"


def write_half(path: Path, error: Exception) -> None:
    with replacing(path) as file:
        file.write_text("half")
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_file_as_it_was(number: int, tmp_path: Path) -> None:
    path = tmp_path / "wandb_id"
    write_text(path, "before")
    with pytest.raises(DiskFullError, match=rf"{path} cannot be written: .*B are free"):
        write_half(path, OSError(number, os.strerror(number)))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with replacing(path) as slow, slow.open("w") as file:
        file.write("slow, ")
        file.flush()
        write_text(path, "fast")
        assert path.read_text() == "fast"
        file.write("but whole")
    assert path.read_text() == "slow, but whole"
    assert list(tmp_path.iterdir()) == [path]


def test_another_error_leaves_the_file_as_it_was_and_is_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "wandb_id"
    write_text(path, "before")
    with pytest.raises(ZeroDivisionError):
        write_half(path, ZeroDivisionError())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_free_space_of_a_path_that_does_not_exist_is_that_of_its_folder(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.01)
    assert (format_bytes(3_250_000), format_bytes(7.04e9)) == ("3.2 MB", "7.0 GB")
