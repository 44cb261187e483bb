"""The "parquet" source: local parquet files, one document per row, streamed a few rows at a time."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.config import ColumnOptions
from data.sources.content import content_hash
from data.sources.files import DamagedFileError, RawRow, convert_read_errors
from data.sources.folders import check_folders
from errors import UserError, called

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 26
_READ_BUFFER_BYTES = 1 << 20


class ParquetDocumentFile:
    """A parquet file; a row's number is its index.

    Row groups are streamed, so that memory is bounded by a batch of rows.

    Args:
        path: The file.
        options: The columns of the text and its score.

    Attributes:
        path: As given.
        num_rows: Number of rows; None until the footer is read.
    """

    def __init__(self, path: Path, options: ColumnOptions) -> None:
        self.path = path
        self._text_column = options.text_column
        self._score_column = None if options.min_score is None else options.score_column
        self.num_rows: int | None = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> list[Any]:
        """The file's name and a hash of its content."""
        with convert_read_errors(self.path):
            return [self.path.name, content_hash(self.path)]

    def check(self) -> None:
        """Read the footer.

        Raises:
            DamagedFileError: The footer is damaged, or a column is missing.
            UserError: The file is missing.
        """
        with self._open() as parquet:
            self.num_rows = parquet.metadata.num_rows

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield rows in order from a given one.

        Args:
            row: Index of the first row to read.

        Raises:
            DamagedFileError: The file is damaged.
            UserError: The file is gone.
        """
        with convert_read_errors(self.path), self._open() as parquet:
            self.num_rows = parquet.metadata.num_rows
            for batch, first in self._batches(parquet, row):
                texts = _values(self._column(batch, self._text_column))
                scores: list[object] = [None] * len(texts)
                if self._score_column is not None:
                    scores = _values(self._column(batch, self._score_column))
                for next_row, (text, score) in enumerate(zip(texts, scores, strict=True), first + 1):
                    yield RawRow(next_row, text, score)

    def progress(self, row: int) -> float:
        """Return the fraction of the file that precedes a row."""
        return row / self.num_rows if self.num_rows else 0.0

    def prefetch(self) -> None:
        """Do nothing: the file is local."""

    def _open(self) -> pq.ParquetFile:
        with convert_read_errors(self.path):
            parquet = pq.ParquetFile(
                self.path,
                pre_buffer=False,
                buffer_size=_READ_BUFFER_BYTES,
                page_checksum_verification=True,  # of the pages that have one
            )
        for key, column in (("text_column", self._text_column), ("score_column", self._score_column)):
            schema = parquet.schema_arrow
            if column is not None and _column_path(schema, column, self.path) is None:
                raise DamagedFileError(
                    f"{self.path} has no column {column!r} (it has {', '.join(schema.names) or 'none'}): "
                    f"set {called(key)} to the one that holds the {key.partition('_')[0]}, or set "
                    f'{called("on_damaged_file")} to "skip"'
                )
        return parquet

    def _column(self, batch: pa.RecordBatch, column: str) -> pa.Array:
        """Return a column, which may be a field of a struct, and is null where the struct is."""
        path = _column_path(batch.schema, column, self.path)
        assert path is not None
        first, *rest = path
        values = batch.column(first)
        for name in rest:
            values = values.flatten()[values.type.get_field_index(name)]
        return values

    def _batches(self, parquet: pq.ParquetFile, first: int) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Yield batches from a row, each with the index of its first row."""
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        position, group = 0, 0
        while group < len(sizes) and position + sizes[group] <= first:
            position += sizes[group]
            group += 1
        columns = [self._text_column, *([] if self._score_column is None else [self._score_column])]
        groups = [parquet.metadata.row_group(each) for each in range(group, len(sizes))]
        row_bytes = max((each.total_byte_size // max(each.num_rows, 1) for each in groups), default=0)
        batches = parquet.iter_batches(
            # rows of many megabytes are read one at a time
            batch_size=max(min(_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1)), 1),
            row_groups=list(range(group, len(sizes))),
            columns=columns,
            use_threads=False,
        )
        for batch in batches:
            drop = max(first - position, 0)
            if drop < len(batch):
                yield batch.slice(drop), position + drop
            position += len(batch)


def local_files(patterns: Sequence[str], kind: str) -> list[Path]:
    """Find local files by paths and globs, in the order given; a glob's matches are sorted.

    Args:
        patterns: Paths and globs.
        kind: The source's kind, for error messages.

    Raises:
        UserError: A pattern matches no file, or two match the same file.
        OSError: A folder that may hold matches cannot be read.
    """
    files: list[Path] = []
    found: dict[Path, str] = {}
    for pattern in patterns:
        path = Path(pattern)
        # an existing path is taken literally, even if it contains brackets
        matches = (
            [path]
            if path.is_file()
            else [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        )
        if not path.is_file():
            check_folders(Path(), pattern)
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise UserError(
                f"no file matches {pattern!r} in {called('files')} of a {kind} source (searched from "
                f"{Path.cwd()}): correct the path; `python -m data.sample --out .cache/sample` makes the "
                "debug configs' files"
            )
        for match in matches:
            resolved = match.resolve()
            if resolved in found:
                raise UserError(
                    f"{match} is named twice in {called('files')} of a {kind} source, by {found[resolved]!r} "
                    f"and by {pattern!r}: name it once"
                )
            found[resolved] = pattern
            files.append(match)
    return files


def _column_path(schema: pa.Schema, column: str, file: Path) -> list[str] | None:
    """Return the names that lead to a column: its own, else those of the structs around it; None without."""
    names = [column] if column in schema.names else column.split(".")
    fields: list[pa.Field] = [*schema]
    for name in names:
        found = [field for field in fields if field.name == name]
        if not found:
            return None
        if len(found) > 1:
            raise UserError(
                f"{file} has {len(found)} columns of the name {name!r}: write it again with one name for each"
            )
        fields = [*found[0].type] if pa.types.is_struct(found[0].type) else []
    return names


def _values(column: pa.Array) -> list[object]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # one row is not UTF-8: return bytes, which are decoded row by row
        try:
            return column.cast(pa.large_binary()).to_pylist()
        except pa.ArrowNotImplementedError:  # of structs or lists, which are no text
            return [value if value.is_valid else None for value in column]
