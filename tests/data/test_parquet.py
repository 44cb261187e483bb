import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import ParquetSource
from data.documents import Row
from data.parquet import ParquetDocuments

WriteParquet = Callable[..., Path]


def _read(source: ParquetDocuments, file: int = 0, row: int = 0) -> list[tuple[int, int, str | None]]:
    return [(each.file, each.row, each.text) for each in source.read(file, row)]


def test_reading_from_any_position_gives_the_rest_in_order(write_parquet: WriteParquet) -> None:
    write_parquet("b.parquet", ["b0", "b1", "b2", "b3", "b4", "b5", "b6"])
    write_parquet("a.parquet", ["a0", "a1"], row_group_size=1)
    last = write_parquet("0.parquet", ["z0"])
    folder = last.parent
    source = ParquetDocuments(ParquetSource(files=[str(folder / "[ab].parquet"), str(last)]))
    everything = _read(source)
    assert [text for _, _, text in everything] == ["a0", "a1", "b0", "b1", "b2", "b3", "b4", "b5", "b6", "z0"]
    for index, (file, row, _) in enumerate(everything):
        assert _read(source, file, row) == everything[index:]
    assert _read(source, 2, 1) == _read(source, 3, 0) == []


def test_reading_resumes_inside_a_row_group_of_many_batches(write_parquet: WriteParquet) -> None:
    texts = [f"text {index}" for index in range(1500)]
    path = write_parquet("a.parquet", texts, row_group_size=700)
    source = ParquetDocuments(ParquetSource(files=[str(path)]))
    for first in (0, 255, 256, 257, 699, 700, 701, 955, 956, 1399, 1400, 1499):
        assert _read(source, 0, first) == [(0, row, texts[row]) for row in range(first, 1500)]


def test_rows_without_text_keep_their_place_and_name_the_reason(write_parquet: WriteParquet) -> None:
    path = write_parquet("a.parquet", ["x", None, "", " \n\t", "y"])
    source = ParquetDocuments(ParquetSource(files=[str(path)]))
    assert list(source.read()) == [
        Row(0, 0, "x", None),
        Row(0, 1, None, "null"),
        Row(0, 2, None, "empty"),
        Row(0, 3, None, "empty"),
        Row(0, 4, "y", None),
    ]


def test_a_row_that_is_not_utf8_costs_only_itself(write_parquet: WriteParquet) -> None:
    raw = pa.array([b"good", b"bad \xff\xfe", None, "gr\u00f6\u00dfe".encode()], pa.binary())
    forged = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    for name, column in (("binary.parquet", raw), ("string.parquet", forged)):
        source = ParquetDocuments(ParquetSource(files=[str(write_parquet(name, column))]))
        assert [(row.text, row.skipped) for row in source.read()] == [
            ("good", None),
            (None, "not_text"),
            (None, "null"),
            ("gr\u00f6\u00dfe", None),
        ]


def test_rows_of_another_type_are_skipped(write_parquet: WriteParquet) -> None:
    source = ParquetDocuments(ParquetSource(files=[str(write_parquet("a.parquet", [1, None, 3]))]))
    assert [row.skipped for row in source.read()] == ["not_text", "null", "not_text"]


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
    list(ParquetDocuments(ParquetSource(files=[str(path)])).read())
    assert asked == [["content"]]


def test_memory_stays_below_the_size_of_a_row_group(write_parquet: WriteParquet) -> None:
    texts = [os.urandom(1000).hex() for _ in range(8000)]
    source = ParquetDocuments(
        ParquetSource(files=[str(write_parquet("a.parquet", texts, row_group_size=8000))])
    )
    pool = pa.proxy_memory_pool(pa.system_memory_pool())
    original = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert sum(len(row.text or "") for row in source.read()) == 16_000_000
    finally:
        pa.set_memory_pool(original)
    assert 0 < pool.max_memory() < 8_000_000


def test_a_missing_file_is_named(tmp_path: Path, write_parquet: WriteParquet) -> None:
    there = write_parquet("a.parquet", ["x"])
    for missing in (tmp_path / "nowhere.parquet", tmp_path / "part-*.parquet"):
        with pytest.raises(ValueError, match=missing.name.replace("*", r"\*")):
            ParquetDocuments(ParquetSource(files=[str(there), str(missing)]))


def test_a_missing_column_names_the_file_and_the_columns_there(write_parquet: WriteParquet) -> None:
    good = write_parquet("good.parquet", ["x"])
    bad = write_parquet("bad.parquet", ["x"], column="text")
    with pytest.raises(
        ValueError, match=r"bad\.parquet has no column 'content' \(it has text, score\).*text_column"
    ):
        ParquetDocuments(ParquetSource(files=[str(good), str(bad)]))


@pytest.mark.parametrize("keep", [0, 3, 100], ids=["empty", "three bytes", "footer gone"])
def test_a_truncated_file_is_named_before_anything_is_read(write_parquet: WriteParquet, keep: int) -> None:
    path = write_parquet("cut.parquet", ["some text"] * 50)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.parquet"):
        ParquetDocuments(ParquetSource(files=[str(path)]))


def test_a_corrupt_page_names_the_file(write_parquet: WriteParquet) -> None:
    path = write_parquet("bad.parquet", [f"some text {index}" for index in range(50)])
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"cannot read .*bad\.parquet"):
        list(ParquetDocuments(ParquetSource(files=[str(path)])).read())


def test_a_file_that_vanishes_after_the_start_is_named(write_parquet: WriteParquet) -> None:
    path = write_parquet("gone.parquet", ["x"])
    source = ParquetDocuments(ParquetSource(files=[str(path)]))
    path.unlink()
    with pytest.raises(ValueError, match=r"gone\.parquet"):
        list(source.read())


def test_an_empty_list_of_files_is_refused() -> None:
    with pytest.raises(ValueError, match="files"):
        ParquetSource(files=[])


def test_the_fingerprint_follows_the_files_and_not_their_folder(
    write_parquet: WriteParquet, tmp_path: Path
) -> None:
    first = write_parquet("a.parquet", ["x", "y"])
    second = write_parquet("b.parquet", ["x"])
    moved = tmp_path / "elsewhere" / "a.parquet"
    moved.parent.mkdir()
    moved.write_bytes(first.read_bytes())

    def fingerprint(*paths: Path, column: str = "content") -> str:
        return ParquetDocuments(
            ParquetSource(files=[str(path) for path in paths], text_column=column)
        ).fingerprint

    assert fingerprint(first) == fingerprint(moved)
    others = {fingerprint(first), fingerprint(second), fingerprint(first, second), fingerprint(second, first)}
    assert len(others) == 4
