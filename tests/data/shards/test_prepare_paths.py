"""`prepare` on a full disk, at paths that are something else, and with options of another source."""

import errno
import os
import re
from pathlib import Path

import pytest

from data.shards import __main__ as shards
from data.shards import writer
from data.tokenizer import Tokenizer
from errors import run_command
from tests.data.shards.folders import problems_of


@pytest.fixture
def words(tmp_path: Path, byte_tokenizer: Tokenizer) -> list[str]:
    """A command that prepares a small file into `out`."""
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text('{"text": "some words of text"}\n' * 9)
    files = ["--files", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path), "--processes", "0"]
    return ["prepare", *files, "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("at", ["shards/00000.partial", "train.index", "prepare.lock", "manifest.json"])
def test_a_full_disk_is_said_in_one_line_and_the_same_command_resumes(
    at: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        # an error of writing has no path
        if at in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run_command(lambda: shards.main(words)) == 2
    assert re.search(r"^error: \S+ cannot be written: .* are free; make room", capsys.readouterr().err, re.M)
    assert run_command(lambda: shards.main(words)) == 0
    assert problems_of(tmp_path / "out") == []
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tmp", writer.PARTIAL)]


@pytest.mark.parametrize(
    "option",
    [
        "--folder d --split test",
        "--folder d --repository foo/bar",
        "--folder d --streaming",
        "--files a.parquet --name x",
        "--files a.parquet --language zh",
        "--files a.parquet --revision abc",
        "--files a.parquet --pattern *",
        "--parts 1 --split test",
        "--hub-files a.parquet --language zh",
        "--dataset d --repository foo/bar",
        "--dataset d --pattern *",
    ],
)
def test_an_option_of_another_source_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "--tokenizer", "none", "--out", "none", *option.split()]
    assert run_command(lambda: shards.main(command)) == 2
    name = option.split()[2]
    assert re.match(rf"error: {name} given without --\S+", capsys.readouterr().err)


@pytest.mark.parametrize("out", ["a.jsonl", "a.jsonl/out", "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_line(
    out: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: shards.main([*words, "--out", str(tmp_path / out)])) == 2
    path = re.escape(str(tmp_path / out))
    assert re.search(rf"^error: (cannot use {path} \(|--out is {path}, but )", capsys.readouterr().err, re.M)
