"""Documents from local parquet files: one column, a few rows at a time, each row with its position."""

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.config import ParquetSource
from data.documents import Row, classify

_ROWS_A_BATCH = 256
_READ_BUFFER_BYTES = 1 << 20


class ParquetDocuments:
    """The rows of a list of parquet files, readable from any position on.

    Memory is bounded by a batch of rows: row groups are streamed, never held whole. The footer of each file
    is read at construction, so that a missing or damaged file or a missing column fails before a run starts.
    """

    def __init__(self, source: ParquetSource) -> None:
        """Find the files and check that each one can be opened and has the text column.

        Args:
            source: Which files, and which of their columns.

        Raises:
            ValueError: If a path or glob matches no file, a file is no readable parquet, or the column is
                missing.
        """
        self.files = _resolve(source.files)
        self.text_column = source.text_column
        self.num_rows: list[int] = []
        for file in self.files:
            with self._open(file) as parquet:
                self.num_rows.append(parquet.metadata.num_rows)

    def __str__(self) -> str:
        """Name the column and the files, shortened if they are many."""
        names = ", ".join(str(file) for file in self.files[:3])
        more = f" and {len(self.files) - 3} more files" if len(self.files) > 3 else ""
        return f"column {self.text_column!r} of {names}{more}"

    @property
    def fingerprint(self) -> str:
        """A short hash of what a position refers to: file names, their row counts, the column.

        Folders are left out: a data set may move.
        """
        names = [[file.name, rows] for file, rows in zip(self.files, self.num_rows, strict=True)]
        return hashlib.sha256(json.dumps([self.text_column, names]).encode()).hexdigest()[:16]

    def read(self, file: int = 0, row: int = 0) -> Iterator[Row]:
        """Yield every row from a position to the end of the last file, in order.

        Args:
            file: Index of the file to begin in; the number of files means the end.
            row: Index of the row in that file to begin with.

        Raises:
            ValueError: If a file turns out to be damaged; names it.
        """
        for index in range(file, len(self.files)):
            first = row if index == file else 0
            try:
                yield from self._read_file(index, first)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"cannot read {self.files[index]} ({_first_line(error)}): the file is damaged or gone, "
                    "fetch or make it again"
                ) from error

    def _open(self, file: Path) -> pq.ParquetFile:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is no parquet file that can be read ({_first_line(error)}): fetch or make it again"
            ) from error
        columns = parquet.schema_arrow.names
        if self.text_column not in columns:
            raise ValueError(
                f"{file} has no column {self.text_column!r} (it has {', '.join(columns) or 'none'}): "
                "set text_column to the one that holds the text"
            )
        return parquet

    def _read_file(self, index: int, first: int) -> Iterator[Row]:
        with self._open(self.files[index]) as parquet:
            sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            position, group = 0, 0
            while group < len(sizes) and position + sizes[group] <= first:
                position += sizes[group]
                group += 1
            batches = parquet.iter_batches(
                batch_size=_ROWS_A_BATCH,
                row_groups=list(range(group, len(sizes))),
                columns=[self.text_column],
                use_threads=False,
            )
            for batch in batches:
                if position + len(batch) > first:
                    drop = max(first - position, 0)
                    for offset, value in enumerate(_values(batch.column(0).slice(drop)), position + drop):
                        yield classify(index, offset, value)
                position += len(batch)


def _resolve(patterns: list[str]) -> list[Path]:
    files: list[Path] = []
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
                f"no file matches {pattern!r} in the files of a parquet source (searched from {Path.cwd()}): "
                "correct the path; `python -m data.sample --out .cache/sample` makes the debug configs' files"
            )
        files.extend(matches)
    return files


def _values(column: pa.Array) -> list[object]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # One bad row must not cost its neighbours: take the bytes and decode each alone.
        return column.cast(pa.large_binary()).to_pylist()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
