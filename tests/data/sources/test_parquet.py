import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import ParquetSource
from data.sources.base import Position
from data.sources.files import FileDocuments
from data.sources.open import open_text

WriteParquet = Callable[..., Path]


def _open(*paths: Path | str, **options: Any) -> FileDocuments:
    return open_text(ParquetSource(files=[str(path) for path in paths], **options))


def _texts(source: FileDocuments, position: Position | None = None) -> list[str | None]:
    return [row.text for row in source.read(position, repeat=False)]


def test_reading_resumes_from_any_position_in_order(write_parquet: WriteParquet) -> None:
    write_parquet("b.parquet", ["b0", "b1", "b2", "b3", "b4", "b5", "b6"])
    write_parquet("a.parquet", ["a0", "a1"], row_group_size=1)
    last = write_parquet("0.parquet", ["z0"])
    source = _open(last.parent / "[ab].parquet", last)
    rows = list(source.read(repeat=False))
    texts = ["a0", "a1", "b0", "b1", "b2", "b3", "b4", "b5", "b6", "z0"]
    assert [row.text for row in rows] == texts
    for index, row in enumerate(rows, 1):
        assert _texts(source, row.next_position) == texts[index:]
    fractions = [source.progress(row.next_position) for row in rows]
    assert fractions == sorted(fractions)
    assert (source.progress(None), fractions[-1]) == (0.0, 1.0)


def test_reading_resumes_inside_a_row_group_of_many_batches(write_parquet: WriteParquet) -> None:
    texts = [f"text {index}" for index in range(1500)]
    path = write_parquet("a.parquet", texts, row_group_size=700)
    source = _open(path)
    for first in (0, 255, 256, 257, 699, 700, 701, 955, 956, 1399, 1400, 1499, 1500):
        assert _texts(source, {"epoch": 0, "file": 0, "row": first, "taken": 0}) == texts[first:]


def test_rows_without_text_are_skipped_with_a_reason(write_parquet: WriteParquet) -> None:
    path = write_parquet("a.parquet", ["x", None, "", " \n\t", "y"])
    rows = list(_open(path).read(repeat=False))
    assert [(row.text, row.skipped) for row in rows] == [
        ("x", None),
        (None, "null"),
        (None, "empty"),
        (None, "empty"),
        ("y", None),
    ]
    assert [row.next_position["row"] for row in rows] == [1, 2, 3, 4, 5]


def test_only_the_row_that_is_not_utf8_is_skipped(write_parquet: WriteParquet) -> None:
    raw = pa.array([b"good", b"bad \xff\xfe", None, "gr\u00f6\u00dfe".encode()], pa.binary())
    forged = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    for name, column in (("binary.parquet", raw), ("string.parquet", forged)):
        source = _open(write_parquet(name, column))
        assert [(row.text, row.skipped) for row in source.read(repeat=False)] == [
            ("good", None),
            (None, "not_text"),
            (None, "null"),
            ("gr\u00f6\u00dfe", None),
        ]


def test_rows_of_another_type_are_skipped(write_parquet: WriteParquet) -> None:
    paths = write_parquet("a.parquet", [1, None, 3]), write_parquet("b.parquet", ["text"])
    with pytest.raises(ValueError, match=r"a\.parquet holds no document \(rows skipped: 2 not_text, 1 null"):
        list(_open(*paths).read(repeat=False))
    source = _open(*paths, on_damaged_file="skip")
    skipped = [row.skipped for row in source.read(repeat=False)]
    assert skipped == ["not_text", "null", "not_text", None]


SCORES = [
    pa.array([0.2, 0.7, None, 0.9, float("nan")], pa.float64()),
    pa.array([0.2, 0.7, None, 0.9, float("nan")], pa.float32()),
    pa.array(["0.2", "0.8", None, " 9e-1", "high"]),
    pa.array([0, 1, None, 2, None], pa.int8()),
    pa.array([False, True, None, True, None]),
]


@pytest.mark.parametrize("scores", SCORES, ids=["float64", "float32", "string", "int8", "bool"])
def test_scores_of_any_dtype_are_converted_and_nan_is_counted(
    write_parquet: WriteParquet, scores: pa.Array
) -> None:
    path = write_parquet("a.parquet", ["a", "b", "c", "d", "e"], scores=scores)
    rows = list(_open(path, min_score=0.7 - 1e-6).read(repeat=False))
    assert [row.skipped for row in rows] == ["low_score", None, "bad_score", None, "bad_score"]
    assert [row.text for row in _open(path).read(repeat=False)] == ["a", "b", "c", "d", "e"]


def test_files_with_different_score_dtypes_are_read_together(write_parquet: WriteParquet) -> None:
    first = write_parquet("1.parquet", ["a", "b"], scores=pa.array([0.1, 0.9], pa.float32()))
    second = write_parquet("2.parquet", ["c", "d"], scores=["0.95", "0.2"])
    assert [text for text in _texts(_open(first, second, min_score=0.8)) if text] == ["b", "c"]


def test_a_missing_score_column_is_named(write_parquet: WriteParquet) -> None:
    path = write_parquet("a.parquet", ["x"])
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'quality' .*set score_column"):
        _open(path, min_score=0.5, score_column="quality")


def test_a_document_of_more_than_10_mb_is_read_whole(write_parquet: WriteParquet) -> None:
    huge = "0123456789 " * 1_000_000
    path = write_parquet("a.parquet", ["small", huge, "small again"])
    assert _texts(_open(path)) == ["small", huge, "small again"]
    skipped = [row.skipped for row in _open(path, max_characters=10_000_000).read(repeat=False)]
    assert skipped == [None, "too_long", None]


def test_only_the_text_column_is_decoded(
    write_parquet: WriteParquet, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet("a.parquet", ["x"])
    asked: list[list[str]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *args: object, **kwargs: object) -> object:
        asked.append(kwargs["columns"])  # type: ignore[arg-type]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    _texts(_open(path))
    _texts(_open(path, min_score=0.5))
    assert asked == [["content"], ["content", "score"]]


def test_memory_stays_below_the_size_of_a_row_group(write_parquet: WriteParquet) -> None:
    texts = [os.urandom(1000).hex() for _ in range(8000)]
    source = _open(write_parquet("a.parquet", texts, row_group_size=8000))
    pool = pa.proxy_memory_pool(pa.system_memory_pool())
    original = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert sum(len(row.text or "") for row in source.read(repeat=False)) == 16_000_000
    finally:
        pa.set_memory_pool(original)
    assert 0 < pool.max_memory() < 8_000_000


def test_rows_of_megabytes_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    table = pa.table({"content": [os.urandom(2_500_000).hex() for _ in range(16)]})
    # a page is read whole: one per row here, as in a file written row by row
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=1)
    source = _open(tmp_path / "a.parquet")
    del table
    pool = pa.proxy_memory_pool(pa.system_memory_pool())
    original = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data.sources.parquet._BATCH_BYTES", 1 << 23)
            assert sum(len(row.text or "") for row in source.read(repeat=False)) == 80_000_000
    finally:
        pa.set_memory_pool(original)
    assert pool.max_memory() < 40_000_000


def test_a_missing_file_is_named(tmp_path: Path, write_parquet: WriteParquet) -> None:
    existing = write_parquet("a.parquet", ["x"])
    for missing in (tmp_path / "nowhere.parquet", tmp_path / "part-*.parquet"):
        with pytest.raises(ValueError, match=missing.name.replace("*", r"\*")):
            _open(existing, missing)


def test_a_file_named_by_two_patterns_is_rejected(write_parquet: WriteParquet) -> None:
    path = write_parquet("a.parquet", ["x"])
    link, glob = path.parent / "link.parquet", path.parent / "a.*"
    link.symlink_to(path)
    for other in (path, glob, path.parent / ".." / path.parent.name / "a.parquet", link):
        with pytest.raises(ValueError, match="is named twice") as raised:
            _open(path, other)
        assert f"by {str(path)!r} and by {str(other)!r}" in str(raised.value)


def test_two_columns_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array([1.0]), pa.array([1]), pa.array([2])]
    names = ["content", "content", "score", "other", "other"]
    pq.write_table(pa.Table.from_arrays(columns, names=names), path)
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns of the name 'content'"):
        _open(path)
    # those that are not read do not matter
    pq.write_table(pa.Table.from_arrays(columns[1:], names=names[1:]), path)
    assert _texts(_open(path, min_score=0.5)) == ["b"]
    twice = pa.StructArray.from_arrays([columns[0], columns[1]], names=["text", "text"])
    pq.write_table(pa.table({"data": twice}), path)
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns of the name 'text'"):
        _open(path, text_column="data.text")


def test_a_field_of_a_struct_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [
        {"data": {"text": "a", "info": {"score": 1.0}}, "own.text": "plain"},
        {"data": None, "own.text": None},
        {"data": {"text": None, "info": None}, "own.text": "b"},
        {"data": {"text": "d", "info": {"score": 0.1}}, "own.text": "c"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    source = _open(path, text_column="data.text")
    read = list(source.read(repeat=False))
    assert [(row.text, row.skipped) for row in read] == [
        ("a", None),
        (None, "null"),
        (None, "null"),
        ("d", None),
    ]
    assert list(source.read(read[1].next_position, repeat=False)) == read[2:]
    scored = _open(path, text_column="own.text", score_column="data.info.score", min_score=0.5)
    assert [row.skipped for row in scored.read(repeat=False)] == [None, "null", "bad_score", "low_score"]
    for column in ("data.nothing", "data.text.deeper", "nothing.text"):
        with pytest.raises(
            ValueError, match=rf"a\.parquet has no column '{column}' \(it has data, own\.text"
        ):
            _open(path, text_column=column)


def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{index} " + "x" * 50 for index in range(300)]
    table = pa.table({"content": texts})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    assert _texts(_open(path)) == texts
    data = bytearray(path.read_bytes())
    data[data.index(b"150 xxxx") + 20] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet \(.*the file is damaged"):
        list(_open(path).read(repeat=False))


def test_a_missing_column_names_the_file_and_its_columns(write_parquet: WriteParquet) -> None:
    good = write_parquet("good.parquet", ["x"])
    bad = write_parquet("bad.parquet", ["x"], column="text")
    with pytest.raises(
        ValueError, match=r"bad\.parquet has no column 'content' \(it has text, score\).*text_column"
    ):
        _open(good, bad)


def test_a_file_with_other_columns_is_skipped_like_a_damaged_one(write_parquet: WriteParquet) -> None:
    good = write_parquet("good.parquet", ["x"])
    bad = write_parquet("bad.parquet", ["x"], column="text")
    rows = list(_open(bad, good, on_damaged_file="skip").read(repeat=False))
    assert [(row.text, row.skipped) for row in rows] == [(None, "damaged_file"), ("x", None)]
    with pytest.raises(ValueError, match="holds no document"):
        list(_open(bad, on_damaged_file="skip").read(repeat=False))


def test_a_struct_that_holds_text_that_is_not_utf8_is_no_text(write_parquet: WriteParquet) -> None:
    encoded = pa.array([b"good", b"\xff", None], pa.binary())
    texts = pa.StringArray.from_buffers(3, *encoded.buffers()[1:], encoded.buffers()[0])
    column = pa.StructArray.from_arrays([texts], names=["text"], mask=pa.array([False, False, True]))
    path = write_parquet("a.parquet", column)
    with pytest.raises(ValueError, match=r"holds no document \(rows skipped: 2 not_text, 1 null"):
        list(_open(path).read(repeat=False))


def test_a_score_that_is_not_utf8_is_a_bad_score(write_parquet: WriteParquet) -> None:
    encoded = pa.array([b"0.5", b"\xff", b"0.1"], pa.binary())
    scores = pa.StringArray.from_buffers(3, *encoded.buffers()[1:])
    path = write_parquet("a.parquet", ["a", "b", "c"], scores=scores)
    rows = list(_open(path, min_score=0.3).read(repeat=False))
    assert [row.skipped for row in rows] == [None, "bad_score", "low_score"]


@pytest.mark.parametrize("keep", [0, 3, 100], ids=["empty", "three_bytes", "no_footer"])
def test_a_truncated_file_is_named_before_anything_is_read(write_parquet: WriteParquet, keep: int) -> None:
    path = write_parquet("cut.parquet", ["some text"] * 50)
    path.write_bytes(path.read_bytes()[:keep])
    good = write_parquet("good.parquet", ["x"])
    with pytest.raises(ValueError, match=r"cut\.parquet"):
        _open(good, path)
    rows = list(_open(path, good, on_damaged_file="skip").read(repeat=False))
    assert [(row.text, row.skipped) for row in rows] == [(None, "damaged_file"), ("x", None)]


def test_a_corrupt_page_names_the_file(write_parquet: WriteParquet) -> None:
    path = write_parquet("bad.parquet", [f"some text {index}" for index in range(50)])
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(bytes(data))
    good = write_parquet("good.parquet", ["x"])
    with pytest.raises(ValueError, match=r"cannot read .*bad\.parquet"):
        _texts(_open(path))
    rows = list(_open(path, good, on_damaged_file="skip").read(repeat=False))
    assert [(row.text, row.skipped) for row in rows] == [(None, "damaged_file"), ("x", None)]
    assert [
        row.text
        for row in _open(path, good, on_damaged_file="skip").read(rows[0].next_position, repeat=False)
    ] == ["x"]


def test_a_file_deleted_after_the_start_is_named(write_parquet: WriteParquet) -> None:
    for on_damaged_file in ("stop", "skip"):
        path = write_parquet("gone.parquet", ["x"])
        source = _open(path, on_damaged_file=on_damaged_file)
        path.unlink()
        # a missing file does not count as damaged: the disk may be unreachable for a moment
        with pytest.raises(ValueError, match=r"gone\.parquet.*gone or unreachable"):
            _texts(source)


def test_an_empty_list_of_files_is_rejected() -> None:
    with pytest.raises(ValueError, match="files"):
        ParquetSource(files=[])


def test_the_fingerprint_depends_on_the_files_and_not_on_their_folder(
    write_parquet: WriteParquet, tmp_path: Path
) -> None:
    first = write_parquet("a.parquet", ["x", "y"])
    second = write_parquet("b.parquet", ["x"])
    moved = tmp_path / "elsewhere" / "a.parquet"
    moved.parent.mkdir()
    moved.write_bytes(first.read_bytes())

    def fingerprint(*paths: Path, **options: Any) -> str:
        return _open(*paths, **options).fingerprint

    assert fingerprint(first) == fingerprint(moved) == fingerprint(first, on_damaged_file="skip")
    others = {
        fingerprint(first),
        fingerprint(second),
        fingerprint(first, second),
        fingerprint(second, first),
        fingerprint(first, min_score=0.5),
        fingerprint(first, max_characters=9),
    }
    assert len(others) == 6
