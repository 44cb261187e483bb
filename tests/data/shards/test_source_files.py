"""Hashes of the local files that shards were made from."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from data.config import JsonlSource
from data.shards import __main__ as shards
from data.shards.prepare import PrepareOptions, Progress, prepare
from data.shards.source_files import verify_sources
from data.sources.open import open_text
from data.sources.shard_format import read_manifest
from data.tokenizer import Tokenizer

TEXTS = [f"document {index} " + "x" * (index * 7 % 23) for index in range(150)]


def _prepare_files(paths: list[Path], tokenizer: Tokenizer, folder: Path, **options: Any) -> Path:
    source = open_text(JsonlSource(files=[str(path) for path in paths]))
    prepare(folder, source, tokenizer, PrepareOptions(**options), description={"kind": "jsonl"})
    return folder


def _jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_hashes_of_the_source_files_are_in_the_manifest_and_verified(
    byte_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS]) for name in "abc"]
    out = _prepare_files(paths, byte_tokenizer, tmp_path / "out")
    sources = read_manifest(out).sources
    assert {path: each.sha256 for path, each in sources.items()} == {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    assert shards.main(["verify", str(out), "--sources"]) == 0
    assert "all 3 source files match their hashes" in capsys.readouterr().out
    # not in a block of a large file
    paths[1].write_bytes(paths[1].read_bytes().replace(b"document 7 ", b"DOCUMENT 7 "))
    paths[2].unlink()
    assert shards.main(["verify", str(out)]) == 0
    assert shards.main(["verify", str(out), "--sources"]) == 1
    printed = capsys.readouterr().out
    assert f"{paths[1]}: its SHA-256 does not match" in printed
    assert f"cannot read {paths[2]}" in printed
    assert "2 of 3 source files have changed" in printed


def test_only_the_files_that_were_read_are_hashed(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    paths = [_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS]) for name in "abc"]
    some = _prepare_files(paths, byte_tokenizer, tmp_path / "some", max_tokens=50)
    assert [*read_manifest(some).sources] == [str(paths[0])]
    prepare(tmp_path / "none", list_source([[*TEXTS]]), byte_tokenizer, PrepareOptions())
    with pytest.raises(ValueError, match="has no hash of a source file"):
        next(verify_sources(tmp_path / "none"))


def test_a_file_that_changes_while_it_is_tokenized_is_named(
    byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = _jsonl(tmp_path / "a.jsonl", TEXTS)
    source = open_text(JsonlSource(files=[str(path)]))

    def edit(progress: Progress) -> None:
        _jsonl(path, TEXTS[::-1])

    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was tokenized"):
        prepare(tmp_path / "out", source, byte_tokenizer, PrepareOptions(), report=edit)
    assert not (tmp_path / "out" / "manifest.json").exists()
