"""Content hashes of files: any change of a small file, and of the blocks and the footer of a large one."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sources.content import content_hash


@pytest.mark.parametrize("seed", range(5))
def test_any_flipped_bit_or_change_of_size_of_a_small_file_is_found(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path, other = tmp_path / "a", tmp_path / "b"
    data = bytearray(draw.randbytes(draw.randrange(1, 300_000)))
    path.write_bytes(data)
    other.write_bytes(data)
    before = content_hash(path)
    assert content_hash(other) == before, "the name does not count"
    for changed in (data[:-1], data + b"\0"):
        path.write_bytes(changed)
        assert content_hash(path) != before
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    assert content_hash(path) != before


def test_the_blocks_of_a_large_file_include_its_first_and_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.content._WHOLE_BYTES", 1000)
    monkeypatch.setattr("data.sources.content._BLOCK_BYTES", 10)
    path = tmp_path / "a"
    data = bytearray(random.Random(0).randbytes(10_007))
    path.write_bytes(data)
    before = content_hash(path)
    found = []
    for at in (0, 9, *range(0, 10_007, 7), 9_997, 10_006):
        data[at] ^= 1
        path.write_bytes(data)
        found += [at] if content_hash(path) != before else []
        data[at] ^= 1
    assert {0, 9, 9_997, 10_006} <= {*found}
    # 16 blocks of 10 of 10,007 bytes
    assert 15 <= len(found) <= 35


def test_another_footer_of_a_large_parquet_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.content._WHOLE_BYTES", 100)
    monkeypatch.setattr("data.sources.content._BLOCK_BYTES", 1)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, word in zip(paths, ("aaa", "aab"), strict=True):
        table = pa.table({"text": [word] * 100})
        pq.write_table(table, path, compression="none", row_group_size=10, store_schema=False)
    assert paths[0].stat().st_size == paths[1].stat().st_size
    # the statistics of the column differ
    assert content_hash(paths[0]) != content_hash(paths[1])
