"""Documents from parquet files: one column, a few rows at a time."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.config import ColumnOptions
from data.sources.files import RawRow, reading

_ROWS_A_BATCH = 256
_BYTES_A_BATCH = 1 << 26
_READ_BUFFER_BYTES = 1 << 20


class ParquetDocumentFile:
    """The rows of a parquet file; a row is known by its index.

    Memory is bounded by a batch of rows: row groups are streamed, never held whole.
    """

    def __init__(self, path: Path, options: ColumnOptions) -> None:
        """Name the file; nothing is opened yet.

        Args:
            path: The file.
            options: Which of its columns.
        """
        self.path = path
        self._text_column = options.text_column
        self._score_column = None if options.min_score is None else options.score_column
        self.num_rows: int | None = None

    def __str__(self) -> str:
        """Name the file."""
        return str(self.path)

    @property
    def identity(self) -> list[Any]:
        """The file's name and its number of rows, None for a damaged file."""
        return [self.path.name, self.num_rows]

    def check(self) -> None:
        """Read the footer.

        Raises:
            DamagedFileError: If there is none.
            ValueError: If the file or a column is missing.
        """
        with self._open() as parquet:
            self.num_rows = parquet.metadata.num_rows

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield every row from one on.

        Args:
            row: Index of the row to begin with.

        Raises:
            DamagedFileError: If the file turns out to be damaged.
            ValueError: If the file is gone.
        """
        with reading(self.path), self._open() as parquet:
            self.num_rows = parquet.metadata.num_rows
            for batch, first in self._batches(parquet, row):
                texts = _values(batch.column(0))
                scores = [None] * len(texts) if batch.num_columns < 2 else batch.column(1).to_pylist()
                for index, (text, score) in enumerate(zip(texts, scores, strict=True), first + 1):
                    yield RawRow(index, text, score)

    def share_before(self, row: int) -> float:
        """Return how much of the file lies before a row."""
        return row / self.num_rows if self.num_rows else 0.0

    def prefetch(self) -> None:
        """Do nothing: the file is here."""

    def _open(self) -> pq.ParquetFile:
        with reading(self.path):
            parquet = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES)
        columns = parquet.schema_arrow.names
        for key, column in (("text_column", self._text_column), ("score_column", self._score_column)):
            if column is not None and column not in columns:
                raise ValueError(
                    f"{self.path} has no column {column!r} (it has {', '.join(columns) or 'none'}): "
                    f"set {key} to the one that holds the {key.partition('_')[0]}"
                )
        return parquet

    def _batches(self, parquet: pq.ParquetFile, first: int) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Yield batches from a row on, each with the index of its first row."""
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        position, group = 0, 0
        while group < len(sizes) and position + sizes[group] <= first:
            position += sizes[group]
            group += 1
        columns = [self._text_column, *([] if self._score_column is None else [self._score_column])]
        groups = [parquet.metadata.row_group(each) for each in range(group, len(sizes))]
        bytes_a_row = max((each.total_byte_size // max(each.num_rows, 1) for each in groups), default=0)
        batches = parquet.iter_batches(
            # Rows of many megabytes come one by one.
            batch_size=max(min(_ROWS_A_BATCH, _BYTES_A_BATCH // max(bytes_a_row, 1)), 1),
            row_groups=list(range(group, len(sizes))),
            columns=columns,
            use_threads=False,
        )
        for batch in batches:
            drop = max(first - position, 0)
            if drop < len(batch):
                # The file's own order of columns is not ours.
                yield batch.select(columns).slice(drop), position + drop
            position += len(batch)


def local_files(patterns: Sequence[str], kind: str) -> list[Path]:
    """Find the files that paths and globs name, in order; a glob's matches are sorted.

    Args:
        patterns: Paths and globs.
        kind: What kind of source asks, for the message.

    Raises:
        ValueError: If a pattern matches no file, or a file is named twice.
    """
    files: list[Path] = []
    found: dict[Path, str] = {}
    for pattern in patterns:
        path = Path(pattern)
        # A path that exists is meant literally, brackets and all.
        matches = (
            [path]
            if path.is_file()
            else [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        )
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise ValueError(
                f"no file matches {pattern!r} in the files of a {kind} source (searched from {Path.cwd()}): "
                "correct the path; `python -m data.sample --out .cache/sample` makes the debug configs' files"
            )
        for match in matches:
            place = match.resolve()
            if place in found:
                raise ValueError(
                    f"{match} is named twice in the files of a {kind} source, by {found[place]!r} and by "
                    f"{pattern!r}, and would be read twice: let one of them name it"
                )
            found[place] = pattern
            files.append(match)
    return files


def _values(column: pa.Array) -> list[object]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # One bad row must not cost its neighbours: take the bytes and decode each alone.
        return column.cast(pa.large_binary()).to_pylist()
