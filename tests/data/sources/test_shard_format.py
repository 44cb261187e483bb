"""Manifests that are damaged, or of another format: an error that names the file, from every reader."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.shards import __main__ as shards
from data.shards.prepare import PrepareOptions, prepare
from data.sources.shard_format import INDEX, MANIFEST_FILE, index_file, read_manifest
from data.tokenizer import Tokenizer
from errors import UserError, run_command


@pytest.fixture
def folder(list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder of one shard."""
    texts = [f"document {index}" for index in range(150)]
    description = {"kind": "hub", "repository": "some/set", "files": ["a.parquet"], "revision": "0123abc"}
    prepare(tmp_path, list_source([texts]), byte_tokenizer, PrepareOptions(), description=description)
    return tmp_path


def _change(folder: Path, path: str, value: Any) -> None:
    """Set the value at a path of keys, separated by dots; None deletes the key."""
    manifest = folder / MANIFEST_FILE
    table = json.loads(manifest.read_text())
    *above, last = (int(key) if key.isdigit() else key for key in path.split("."))
    part = table
    for key in above:
        part = part[key]
    part[last] = value
    if value is None:
        del part[last]
    manifest.write_text(json.dumps(table))


DAMAGE: list[tuple[str, Any]] = [
    *((key, wrong) for key in ("settings", "skipped", "splits", "shards") for wrong in (None, [], "x", 3)),
    ("shards", {}),
    ("shards.0", {}),
    ("shards.0.train.sha256", {}),
    ("shards.0.train.tokens", "7"),
    ("sources", []),
    ("sources", {"a.jsonl": {}}),
    ("sources", {"a.jsonl": {"num_bytes": "1", "sha256": "a", "content": "b"}}),
    ("skipped", {"null": "many"}),
    ("splits.train", None),
    ("splits.train.documents", 1.5),
    ("splits.train.sha256", {}),
    ("splits.train.sha256.index", 3),
    ("settings.format", None),
    ("settings.format", "1"),
    ("settings.source", "a"),
    ("settings.source.kind", ["hub"]),
    ("settings.source.repository", None),
    ("settings.tokenizer", []),
    ("settings.tokenizer.vocab_size", "257"),
    ("settings.tokenizer.fingerprint", 3),
]


@pytest.mark.parametrize(("path", "value"), DAMAGE)
def test_a_damaged_manifest_is_named(
    path: str, value: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_manifest(folder).shards
    _change(folder, path, value)
    with pytest.raises(UserError, match=rf"{MANIFEST_FILE} is damaged \(.*\): delete it and prepare again"):
        read_manifest(folder)
    for command in ("info", "verify"):
        assert run_command(lambda command=command: shards.main([command, str(folder)])) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_another_format_is_refused(folder: Path) -> None:
    _change(folder, "settings.format", 99)
    with pytest.raises(UserError, match="was prepared in format 99, and this version reads format 1"):
        read_manifest(folder)


@pytest.mark.parametrize("num_bytes", [None, 0, 1, INDEX.itemsize * 3])
def test_info_names_an_index_that_is_missing_or_truncated(
    num_bytes: int | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = index_file(folder, "train")
    data = path.read_bytes()
    path.unlink()
    if num_bytes is not None:
        path.write_bytes(data[:num_bytes])
    assert run_command(lambda: shards.main(["info", str(folder)])) == 2
    assert str(path) in capsys.readouterr().err


def test_a_source_without_a_name_is_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(folder, "settings.source", {})
    assert run_command(lambda: shards.main(["info", str(folder)])) == 0
    assert f"{folder}: 1 shard\n" in capsys.readouterr().out


def test_info_counts_one_shard_in_the_singular(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: shards.main(["info", str(folder)])) == 0
    assert f"{folder}: 1 shard of hub files" in capsys.readouterr().out
