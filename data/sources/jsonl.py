"""The "jsonl" source: files of JSON objects, one document per line, compressed or not."""

import contextlib
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.config import ColumnOptions
from data.sources.content import content_hash
from data.sources.files import RawRow, convert_read_errors

_MAX_LINE_BYTES = 1 << 28
_COMPRESSED_SUFFIXES = {".gz", ".bz2", ".zst", ".zstd", ".lz4", ".xz"}
# compression by a file's first bytes, whatever its name
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xfd7zXZ\x00": "xz",
    # a frame to skip, with which pzstd begins
    **{bytes([first]) + b"\x2a\x4d\x18": "zstd" for first in range(0x50, 0x60)},
}


class JsonlDocumentFile:
    """A JSONL file; a row's number is its line's byte offset in the uncompressed text.

    Args:
        path: The file; gzip, bzip2, Zstandard, LZ4 and xz are decompressed while reading.
        options: The keys of the text and its score.
    """

    def __init__(self, path: Path, options: ColumnOptions) -> None:
        self.path = path
        self._options = options
        self._num_bytes = 0

    def __str__(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> list[Any]:
        """The file's name and a hash of its content."""
        with convert_read_errors(self.path):
            return [self.path.name, content_hash(self.path)]

    def check(self) -> None:
        """Read the file's size.

        Raises:
            DamagedFileError: The file is empty, though its name says that it is compressed.
            UserError: The file is missing.
        """
        with convert_read_errors(self.path):
            self._num_bytes = self.path.stat().st_size
            if not self._num_bytes and self.path.suffix in _COMPRESSED_SUFFIXES:
                raise EOFError("it is empty, which no compressed file is")

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield lines in order from a given one.

        Args:
            row: Byte offset of the first line to read.

        Raises:
            DamagedFileError: The compressed data is damaged or truncated.
            UserError: The file is gone.
        """
        self.check()
        with convert_read_errors(self.path), _open(self.path) as lines:
            offset = _skip(lines, row)
            while line := lines.readline(_MAX_LINE_BYTES):
                is_whole = line.endswith(b"\n") or len(line) < _MAX_LINE_BYTES
                offset += len(line)
                while not line.endswith(b"\n") and (rest := lines.readline(_MAX_LINE_BYTES)):
                    offset, line = offset + len(rest), rest
                yield self._row(offset, line) if is_whole else RawRow(offset, skipped="too_long")

    def progress(self, row: int) -> float:
        """Return the fraction of the file that precedes a row; an overestimate if it is compressed."""
        return min(row / self._num_bytes, 1.0) if self._num_bytes else 0.0

    def prefetch(self) -> None:
        """Do nothing: the file is local."""

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
        score = None if self._options.min_score is None else _value(record, self._options.score_column)
        return RawRow(next_row, _value(record, self._options.text_column), score)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed."""
    with path.open("rb") as file:
        start = file.read(max(map(len, _MAGIC)))
    compression = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    with (
        # pyarrow reads all of them but xz
        lzma.open(path) if compression == "xz" else pa.input_stream(str(path), compression=compression)
    ) as stream:
        yield io.BufferedReader(stream, 1 << 20)


def _value(record: dict[str, Any], key: str) -> object:
    """Return the value of a key, which may name the keys of nested objects, separated by dots."""
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _skip(lines: io.BufferedReader, num_bytes: int) -> int:
    """Skip bytes by reading them, since a compressed stream cannot seek; return how many were skipped."""
    remaining = num_bytes
    while remaining and (num_read := len(lines.read(min(remaining, 1 << 20)))):
        remaining -= num_read
    return num_bytes - remaining
