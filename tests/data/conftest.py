"""Fixtures of the data tests: a tokenizer of one token a byte, and sources in memory and on disk."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.documents import Row, classify
from data.tokenizer import Tokenizer, train_byte_level_bpe


class ListSource:
    """Rows held in memory, file by file; may fail at a given position."""

    def __init__(self, files: Sequence[Sequence[object]], fail_at: tuple[int, int] | None = None) -> None:
        self.files = files
        self.fail_at = fail_at

    def __str__(self) -> str:
        return "a list"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.files).encode()).hexdigest()[:16]

    def read(self, file: int = 0, row: int = 0) -> Iterator[Row]:
        for index in range(file, len(self.files)):
            for offset in range(row if index == file else 0, len(self.files[index])):
                if (index, offset) == self.fail_at:
                    raise ValueError("part-7.parquet is damaged at row 3")
                yield classify(index, offset, self.files[index][offset])


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that a text of n ASCII letters has n tokens; the end of a document is id 0."""
    return Tokenizer(train_byte_level_bpe([], 257))


@pytest.fixture(scope="session")
def list_source() -> type[ListSource]:
    return ListSource


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write values as the column of a parquet file below the test's folder."""

    def write(
        name: str, values: Sequence[object] | pa.Array, column: str = "content", row_group_size: int = 3
    ) -> Path:
        array = values if isinstance(values, pa.Array) else pa.array(values)
        table = pa.table({column: array, "score": pa.array([1.0] * len(array), pa.float32())})
        path = tmp_path / name
        pq.write_table(table, path, row_group_size=row_group_size)
        return path

    return write
