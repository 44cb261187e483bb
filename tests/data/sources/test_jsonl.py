import argparse
import bz2
import functools
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data.config import JsonlSource
from data.sources.cli import add_source_arguments, source_from
from data.sources.files import FileDocuments
from data.sources.open import open_text

LINES = [
    b'\xef\xbb\xbf{"text": "first", "score": "0.9"}',
    b'{"text": null}',
    b"",
    b'{"text": "not closed',
    b'["a list"]',
    b'{"other": "no text"}',
    b'{"text": "bad \xff byte"}',
    b'{"text": "half a pair \\ud800"}',
    b'{"text": 7}',
    json.dumps({"text": "gr\u00f6\u00dfe \U0001f600", "score": 0.4}).encode(),
    b"[" * 100_000,
    b'{"text": "last", "score": 1}',
]
REASONS = [
    None,
    "null",
    "empty",
    "malformed",
    "malformed",
    "null",
    "not_text",
    "not_text",
    "not_text",
    None,
    "malformed",
    None,
]


def _write(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path


def _open(*paths: Path, **options: Any) -> FileDocuments:
    return open_text(JsonlSource(files=[str(path) for path in paths], **options))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("end", [b"\n", b""], ids=["newline_at_end", "no_newline_at_end"])
def test_each_line_is_a_document_or_skipped_and_reading_resumes_after_any(
    tmp_path: Path, name: str, end: bytes
) -> None:
    source = _open(_write(tmp_path / name, b"\n".join(LINES) + end))
    rows = list(source.read(repeat=False))
    assert [row.skipped for row in rows] == REASONS
    assert [row.text for row in rows if row.text] == ["first", "gr\u00f6\u00dfe \U0001f600", "last"]
    for index, row in enumerate(rows, 1):
        assert list(source.read(row.next_position, repeat=False)) == rows[index:]
    # the progress in a compressed file is only approximate
    assert name != "a.jsonl" or source.progress(rows[-1].next_position) == 1.0


def test_scores_and_other_keys(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", b"\n".join([LINES[0], LINES[9], LINES[11]]))
    rows = list(_open(path, min_score=0.5).read(repeat=False))
    assert [row.skipped for row in rows] == [None, "low_score", None]
    rows = list(_open(path, text_column="score").read(repeat=False))
    assert [row.text for row in rows] == ["0.9", None, None]


def test_a_document_of_more_than_10_mb_is_read_and_a_line_above_the_limit_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = "0123456789 " * 1_000_000
    path = _write(
        tmp_path / "a.jsonl", b"\n".join(json.dumps({"text": text}).encode() for text in (huge, "x"))
    )
    assert [row.text for row in _open(path).read(repeat=False)] == [huge, "x"]
    monkeypatch.setattr("data.sources.jsonl._MAX_LINE_BYTES", 1 << 20)
    source = _open(path)
    rows = list(source.read(repeat=False))
    assert [(row.text, row.skipped) for row in rows] == [(None, "too_long"), ("x", None)]
    assert list(source.read(rows[0].next_position, repeat=False)) == rows[1:]


@pytest.mark.parametrize("name", ["truncated.jsonl.gz", "truncated.jsonl.zst"])
def test_a_truncated_file_raises_with_its_name_or_its_rest_is_skipped_and_counted(
    tmp_path: Path, name: str
) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % index for index in range(50_000))
    path = _write(tmp_path / name, lines)
    path.write_bytes(path.read_bytes()[:-20])
    good = _write(tmp_path / "good.jsonl", b'{"text": "good"}')
    with pytest.raises(ValueError, match=rf"cannot read .*{name}.*damaged"):
        list(_open(path, good).read(repeat=False))
    rows = list(_open(path, good, on_damaged_file="skip").read(repeat=False))
    assert [(row.text, row.skipped) for row in rows[-2:]] == [(None, "damaged_file"), ("good", None)]


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    **{
        suffix: functools.partial(pa.compress, codec=codec, asbytes=True)
        for suffix, codec in (("zst", "zstd"), ("zstd", "zstd"), ("lz4", "lz4"))
    },
    "pzstd": lambda data: b"\x50\x2a\x4d\x18\x04\0\0\0size" + pa.compress(data, codec="zstd", asbytes=True),
    "none": bytes,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zstd", ".xz"])
def test_compression_is_told_by_the_first_bytes(tmp_path: Path, compression: str, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    texts = [f"{index} " + "text" * 9 for index in range(500)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(COMPRESSIONS[compression](data))
    source = _open(path)
    rows = list(source.read(repeat=False))
    assert [row.text for row in rows] == texts
    assert list(source.read(rows[300].next_position, repeat=False)) == rows[301:]
    options = _parsed("--files", str(path))
    assert options == JsonlSource(files=[str(path)])
    if compression != "none":
        path.write_bytes(COMPRESSIONS[compression](data)[:-20])
        with pytest.raises(ValueError, match=r"cannot read .*damaged"):
            list(source.read(repeat=False))


def _parsed(*words: str) -> object:
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    return source_from(parser.parse_args(words))


def test_a_nested_key_is_named_by_its_path(tmp_path: Path) -> None:
    lines: list[object] = [
        {"data": {"text": "a", "info": {"score": 1}}},
        {"data": "b"},
        {"data": {"text": None}},
        {"data.text": "d", "data": {"text": "e"}},
    ]
    path = _write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)).encode())
    rows = list(_open(path, text_column="data.text").read(repeat=False))
    assert [(row.text, row.skipped) for row in rows] == [
        ("a", None),
        (None, "null"),
        (None, "null"),
        ("d", None),
    ]
    scored = _open(path, text_column="data.text", score_column="data.info.score", min_score=0.5)
    assert [row.skipped for row in scored.read(repeat=False)] == [None, "null", "null", "bad_score"]


@pytest.mark.parametrize("seed", [None, 1])
def test_a_file_without_a_document_is_named_beside_good_ones(
    tmp_path: Path, seed: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    good = _write(tmp_path / "good.jsonl", b'{"text": "good"}\n{"other": "bad"}\n')
    empty = _write(tmp_path / "empty.jsonl", b"")
    short = _write(tmp_path / "short.jsonl", b'{"text": "no"}\n{"text": null}\n')
    bad = {
        "key.jsonl": (b'{"content": "text"}\n' * 3, "3 null"),
        "zip.jsonl": (b"PK\x03\x04\n\xff\xfe\n", "1 .*, 1 .*"),
        "array.jsonl": (b'[{"text": "one"},\n{"text": "two"}]\n', "2 malformed"),
        "blank.jsonl": (b"\n\n", "2 empty"),
    }
    limits: dict[str, Any] = {"min_characters": 3}
    for name, (data, skipped) in bad.items():
        files = [str(good), str(empty), str(short), str(_write(tmp_path / name, data))]
        source = open_text(JsonlSource(files=files, **limits), shuffle_seed=seed)
        hint = "; malformed are lines that are no JSON object" if name in ("zip.jsonl", "array.jsonl") else ""
        message = rf"{name} holds no document \(rows skipped: {skipped}; text_column is 'text'{hint}\)"
        with pytest.raises(ValueError, match=message):
            list(source.read(repeat=False))
        caplog.clear()
        source = open_text(JsonlSource(files=files, on_damaged_file="skip", **limits), shuffle_seed=seed)
        rows = list(source.read(repeat=False))
        assert [row.text for row in rows if row.text] == ["good"]
        assert f"{name} holds no document: its {data.count(10)} rows were skipped" in caplog.text
        for index, row in enumerate(rows, 1):
            assert list(source.read(row.next_position, repeat=False)) == rows[index:]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches .*nowhere\.jsonl' in files of a jsonl source"):
        _open(tmp_path / "nowhere.jsonl")


def test_a_compressed_file_of_no_bytes_is_damaged(tmp_path: Path) -> None:
    good, cut = _write(tmp_path / "good.jsonl", b'{"text": "a"}\n'), tmp_path / "cut.jsonl.gz"
    cut.touch()
    files = [str(good), str(cut)]
    with pytest.raises(ValueError, match=r"cannot read .*cut\.jsonl\.gz \(it is empty"):
        open_text(JsonlSource(files=files))
    rows = list(open_text(JsonlSource(files=files, on_damaged_file="skip")).read(repeat=False))
    assert [row.text for row in rows if row.text] == ["a"]
