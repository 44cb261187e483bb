"""Documents from files of JSON objects, one a line, compressed or not."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.config import ColumnOptions
from data.sources.files import RawRow, reading

_MAX_LINE_BYTES = 1 << 28


class JsonlDocumentFile:
    """The lines of a file; a row is known by the offset of its line in the uncompressed text, in bytes."""

    def __init__(self, path: Path, options: ColumnOptions) -> None:
        """Name the file; nothing is opened yet.

        Args:
            path: The file; .gz, .bz2, .zst and .lz4 are uncompressed while reading.
            options: Which keys hold the text and its score.
        """
        self.path = path
        self._options = options
        self._num_bytes = 0

    def __str__(self) -> str:
        """Name the file."""
        return str(self.path)

    @property
    def identity(self) -> list[Any]:
        """The file's name and its size in bytes."""
        return [self.path.name, self._num_bytes]

    def check(self) -> None:
        """Take the file's size.

        Raises:
            ValueError: If the file is missing.
        """
        with reading(self.path):
            self._num_bytes = self.path.stat().st_size

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield every line from one on.

        Args:
            row: Offset of the line to begin with.

        Raises:
            DamagedFileError: If the compressed text is damaged or cut off.
            ValueError: If the file is gone.
        """
        with reading(self.path), pa.input_stream(str(self.path), compression="detect") as stream:
            lines = io.BufferedReader(stream, 1 << 20)
            offset = _skip(lines, row)
            while line := lines.readline(_MAX_LINE_BYTES):
                is_whole = line.endswith(b"\n") or len(line) < _MAX_LINE_BYTES
                offset += len(line)
                while not line.endswith(b"\n") and (rest := lines.readline(_MAX_LINE_BYTES)):
                    offset, line = offset + len(rest), rest
                yield self._row(offset, line) if is_whole else RawRow(offset, skipped="too_long")

    def share_before(self, row: int) -> float:
        """Return how much of the file lies before a row; of a compressed one at most that much."""
        return min(row / self._num_bytes, 1.0) if self._num_bytes else 0.0

    def prefetch(self) -> None:
        """Do nothing: the file is here."""

    def _row(self, next_row: int, line: bytes) -> RawRow:
        if not line.strip():
            return RawRow(next_row, "")
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return RawRow(next_row, skipped="not_text")
        except (ValueError, RecursionError):
            return RawRow(next_row, skipped="malformed")
        if not isinstance(record, dict):
            return RawRow(next_row, skipped="malformed")
        return RawRow(next_row, record.get(self._options.text_column), record.get(self._options.score_column))


def _skip(lines: io.BufferedReader, num_bytes: int) -> int:
    """Read past a number of bytes; a compressed stream cannot seek."""
    left = num_bytes
    while left and (passed := len(lines.read(min(left, 1 << 20)))):
        left -= passed
    return num_bytes - left
