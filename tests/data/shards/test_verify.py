"""Verification of shards whose checksums fit, but whose content does not: the work of a faulty writer."""

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.shards.prepare import PrepareOptions, prepare
from data.sources.shard_format import DOCUMENT, INDEX, TOKEN, file_sha256, read_shard, shard_folder
from data.tokenizer import Tokenizer
from tests.data.shards.folders import problems_of

END = 0


@pytest.fixture
def folder(list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Five shards or more."""
    texts = [f"document {index} " + "x" * (index * 7 % 23) for index in range(150)]
    prepare(tmp_path, list_source([texts]), byte_tokenizer, PrepareOptions(shard_tokens=700))
    return tmp_path


def test_verify_finds_a_shard_in_the_middle_that_says_it_is_the_last(folder: Path) -> None:
    path = shard_folder(folder, 1) / "shard.json"
    path.write_text(path.read_text().replace('"is_last": false', '"is_last": true'))
    assert read_shard(folder, 1).is_last
    assert any("does not start where the previous shard ends" in each for each in problems_of(folder))


def test_verify_finds_a_first_shard_that_starts_later(folder: Path) -> None:
    path = shard_folder(folder, 0) / "shard.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"first": {"file": 0, "row": 3}}))
    assert any("do not span the source from start to end" in each for each in problems_of(folder))


def _seal(folder: Path, number: int, split: str) -> None:
    """Write the checksums of a shard's files anew, as a faulty writer would have."""
    stem = shard_folder(folder, number) / split
    tokens = np.fromfile(stem.with_suffix(".tokens"), TOKEN)
    documents: Any = np.fromfile(stem.with_suffix(".documents"), DOCUMENT)
    bounds = itertools.pairwise([0, *np.cumsum(documents["length"]).tolist()])
    documents["crc32"] = [zlib.crc32(tokens[first:last].tobytes()) for first, last in bounds]
    documents.tofile(stem.with_suffix(".documents"))
    hashes = {each: file_sha256(stem.with_suffix(f".{each}")) for each in ("tokens", "documents")}
    for path in (stem.with_name("shard.json"), folder / "manifest.json"):
        table = json.loads(path.read_text())
        (table["shards"][number] if "shards" in table else table["splits"])[split]["sha256"].update(hashes)
        path.write_text(json.dumps(table))


def test_verify_does_not_trust_checksums_alone(folder: Path) -> None:
    _seal(folder, 1, "train")
    assert problems_of(folder) == []
    path = shard_folder(folder, 1) / "train.tokens"
    tokens = np.fromfile(path, TOKEN)
    first_end = int(np.flatnonzero(tokens == END)[0])
    for index, value in ((first_end - 1, 257), (first_end, 5)):
        changed = tokens.copy()
        changed[index] = value
        changed.tofile(path)
        _seal(folder, 1, "train")
        message = "an id is not in the vocabulary, or a document has no end-of-document token"
        assert any(message in each for each in problems_of(folder)), (index, value)
    tokens.tofile(path)
    _seal(folder, 1, "train")
    assert problems_of(folder) == []


def test_verify_finds_a_record_after_the_end_of_an_index(folder: Path) -> None:
    index, manifest = folder / "train.index", folder / "manifest.json"
    records = np.fromfile(index, INDEX)
    np.append(records, records[-1:]).tofile(index)
    table = json.loads(manifest.read_text())
    table["splits"]["train"]["sha256"]["index"] = file_sha256(index)
    manifest.write_text(json.dumps(table))
    assert problems_of(folder) == [f"{index}: does not end with the sentinel after the last document"]
