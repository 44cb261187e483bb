"""Fixtures of the data tests: a byte-level tokenizer, and sources in memory and on disk."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import Split, TextOptions
from data.sources.files import DamagedFileError, FileDocuments, RawRow
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_byte_level_bpe


class ListFile:
    """A file of rows in memory, optionally damaged from a row on."""

    def __init__(self, name: str, values: Sequence[object], damaged_at: int | None = None) -> None:
        self.name = name
        self.values = values
        self.damaged_at = damaged_at

    def __str__(self) -> str:
        return self.name

    @property
    def identity(self) -> list[Any]:
        return [self.name, hashlib.sha256(repr(self.values).encode()).hexdigest()]

    def check(self) -> None:
        pass

    def read(self, row: int) -> Iterator[RawRow]:
        for index in range(row, len(self.values)):
            if index == self.damaged_at:
                raise DamagedFileError(f"{self.name} is damaged at row {index}")
            yield RawRow(index + 1, self.values[index])

    def progress(self, row: int) -> float:
        return row / len(self.values)

    def prefetch(self) -> None:
        pass


def make_list_source(
    files: Sequence[Sequence[object]],
    damaged_at: tuple[int, int] | None = None,
    options: TextOptions | None = None,
    split: Split = "all",
    shuffle_seed: int | None = None,
    log_skipped: bool = True,
) -> FileDocuments:
    """A source of lists, each in place of a file."""
    damage = {} if damaged_at is None else {damaged_at[0]: damaged_at[1]}
    return FileDocuments(
        [ListFile(f"part-{index}", values, damage.get(index)) for index, values in enumerate(files)],
        options or TextOptions(),
        description="a list",
        split=split,
        shuffle_seed=shuffle_seed,
        log_skipped=log_skipped,
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token per byte: a text of n ASCII letters has n tokens. The end-of-document token is id 0."""
    return Tokenizer(train_byte_level_bpe([], 257))


@pytest.fixture(scope="session")
def list_source() -> Callable[..., FileDocuments]:
    return make_list_source


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write values as a column of a parquet file in the test's folder."""

    def write(
        name: str,
        values: Sequence[object] | pa.Array,
        column: str = "content",
        row_group_size: int = 3,
        scores: Sequence[object] | pa.Array | None = None,
    ) -> Path:
        array = values if isinstance(values, pa.Array) else pa.array(values)
        if not isinstance(scores, pa.Array):
            scores = pa.array([1.0] * len(array), pa.float32()) if scores is None else pa.array(scores)
        table = pa.table({column: array, "score": scores})
        path = tmp_path / name
        pq.write_table(table, path, row_group_size=row_group_size)
        return path

    return write
