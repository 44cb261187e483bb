"""A list of files as a source of documents: epochs, filters, damaged files, and a shuffle that resumes.

Without a seed, rows come in the order of the files. With a seed, each epoch permutes the files, and the rows
within blocks of 8,192 consecutive rows (fewer where rows are long: a block ends with the row that brings it
to 64M characters). This approximates a full shuffle: rows of one block stay close to each other. A position
then names the block and the number of its rows already read; on resume the block is read again, and nothing
else is kept. A file whose rows can be read in any order is permuted as a whole.
"""

import contextlib
import functools
import logging
import lzma
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from data.config import ColumnOptions, Split, TextOptions
from data.fingerprint import fingerprint_files, join_parts
from data.permutation import Permutation
from data.sources.base import WORTHWHILE_EPOCHS, Position, Row
from data.sources.filters import DEFECTS, Filter
from errors import UserError, called

logger = logging.getLogger("parallax")

BLOCK_ROWS = 8192
BLOCK_CHARACTERS = 1 << 26

_IDENTIFY_THREADS = 16

# left out of the fingerprint: files count by their identity, and a damaged file's rows keep their positions
_NOT_FINGERPRINTED = ("files", "folder", "path", "name", "revision", "on_damaged_file")


class DamagedFileError(UserError):
    """A file exists but its content is damaged; the message names it."""


class RawRow(NamedTuple):
    """A row as stored in a file, before filtering.

    Attributes:
        next_row: Row from which reading resumes; None at the end of a damaged file.
        value: The text, as stored.
        score: Its quality score, as stored.
        skipped: Reason to skip the row, if reading it failed.
    """

    next_row: int | None
    value: object = None
    score: object = None
    skipped: str | None = None


class DocumentFile(Protocol):
    """One file of documents. Its `str` names it in error messages."""

    @property
    def identity(self) -> list[Any]:
        """Plain JSON: the file's name, then what else distinguishes it from others, whatever their folder.

        Raises:
            UserError: The file cannot be read.
        """
        ...

    def check(self) -> None:
        """Check what can be checked without reading the rows.

        Raises:
            DamagedFileError: The file is damaged.
            UserError: The file is missing or lacks a column.
        """
        ...

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield rows in order from a given one.

        Args:
            row: 0 for the first, else a `next_row`.

        Raises:
            DamagedFileError: The file is damaged.
            UserError: The file is gone, or cannot be downloaded.
        """
        ...

    def progress(self, row: int) -> float:
        """Return the approximate fraction of the file that precedes a row, from 0 to 1."""
        ...

    def prefetch(self) -> None:
        """Start downloading the file in the background, if it is remote."""
        ...


@runtime_checkable
class PermutableFile(DocumentFile, Protocol):
    """A file whose rows can be read in any order; a shuffle permutes all of them instead of blocks."""

    def permuted(self, *key: int | str) -> DocumentFile:
        """Return the file with its rows in the order of a permutation.

        Args:
            key: Seeds the permutation.
        """
        ...


class FilePosition(NamedTuple):
    """A position in the epochs over a list of files. The field names are keys of saved positions.

    Attributes:
        epoch: Epoch, from 0.
        file: Index of the file in the epoch's order.
        row: The next row of the file; with shuffling, the first row of the block.
        taken: Rows of that block already read; 0 without shuffling.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    taken: int = 0


class FileDocuments:
    """Documents of a list of files; the constructor checks every file.

    Args:
        files: The files, in order.
        options: Filters, and what to do about damaged files.
        description: Name of this source in error messages.
        split: Documents to keep, by data/sources/split.py.
        shuffle_seed: Seed of the shuffle; None for the order of the files.
        log_skipped: Whether this process logs skipped rows.

    Raises:
        UserError: A file is missing, lacks a column, or is damaged while on_damaged_file is "stop".
    """

    def __init__(
        self,
        files: Sequence[DocumentFile],
        options: TextOptions,
        *,
        description: str,
        split: Split = "all",
        shuffle_seed: int | None = None,
        log_skipped: bool = True,
    ) -> None:
        self.files = files
        self._options = options
        self._description = description
        self._filter = Filter(
            split=split,
            min_score=getattr(options, "min_score", None),
            min_characters=options.min_characters,
            max_characters=options.max_characters,
        )
        self._shuffle_seed = shuffle_seed
        self._log_skipped = log_skipped
        for file in files:
            try:
                file.check()
            except DamagedFileError:
                # if damaged files are skipped, reading finds the damage again and counts it
                if options.on_damaged_file == "stop":
                    raise

    def __str__(self) -> str:
        return self._description

    @functools.cached_property
    def fingerprint(self) -> str:
        """The files (not their folders: a dataset may move) by their content, the filters and the order."""
        options = {
            name: value for name, value in vars(self._options).items() if name not in _NOT_FINGERPRINTED
        }
        order = {"split": self._filter.split, "shuffle_seed": self._shuffle_seed}
        return join_parts({**options, **order, **identify(self.files)})

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield rows in order from a position.

        Args:
            position: A row's `next_position`; None for the start.
            repeat: Whether to start another epoch at the end of each.

        Raises:
            UserError: A file cannot be read (the message names it), or a whole epoch holds no document.
        """
        epoch, first_file, row, taken = FilePosition(**(position or {}))
        while True:
            counts: Counter[str | None] = Counter()
            is_whole_epoch = (first_file, row, taken) == (0, 0, 0)
            for index in range(first_file, len(self.files)):
                self._prefetch_next(epoch, index, repeat)
                in_file: Counter[str | None] = Counter()
                for each in self._read_file(epoch, index, row, taken):
                    in_file[each.skipped] += 1
                    yield each
                if (row, taken) == (0, 0):
                    self._judge_file(self._file(epoch, index), in_file)
                counts += in_file
                row = taken = 0
            self._end_epoch(epoch, counts, is_whole_epoch)
            if not repeat:
                return
            epoch, first_file = epoch + 1, 0
            self._log_repetition(epoch)

    def progress(self, position: Position | None) -> float:
        """Return the approximate fraction of the first epoch that precedes a position, from 0 to 1."""
        at = FilePosition(**(position or {}))
        if at.epoch or at.file >= len(self.files):
            return 1.0
        return (at.file + self._file(0, at.file).progress(at.row)) / len(self.files)

    def _file(self, epoch: int, index: int) -> DocumentFile:
        if self._shuffle_seed is None:
            return self.files[index]
        order = Permutation(len(self.files), self._shuffle_seed, "files", epoch)
        return self.files[int(order(np.array([index]))[0])]

    def _prefetch_next(self, epoch: int, index: int, repeat: bool) -> None:
        if index + 1 < len(self.files):
            self._file(epoch, index + 1).prefetch()
        elif repeat:
            self._file(epoch + 1, 0).prefetch()

    def _read_file(self, epoch: int, index: int, row: int, taken: int) -> Iterator[Row]:
        file = self._file(epoch, index)
        is_permutable = isinstance(file, PermutableFile)
        if self._shuffle_seed is not None and is_permutable:
            file = file.permuted(self._shuffle_seed, "rows", epoch, index)
        if self._shuffle_seed is None or is_permutable:
            for raw in self._raw_rows(file, row):
                yield self._row(_position_after(epoch, index, raw), raw)
            return
        for first, block in _blocks(self._raw_rows(file, row), row):
            order = Permutation(len(block), self._shuffle_seed, "rows", epoch, index, first)
            after_block = _position_after(epoch, index, block[-1])
            for count, which in enumerate(order(np.arange(len(block))).tolist()[taken:], taken + 1):
                after = FilePosition(epoch, index, first, count) if count < len(block) else after_block
                yield self._row(after, block[which])
            taken = 0

    def _raw_rows(self, file: DocumentFile, row: int) -> Iterator[RawRow]:
        try:
            yield from file.read(row)
        except DamagedFileError as error:
            if self._options.on_damaged_file == "stop":
                raise
            if self._log_skipped:
                logger.warning("skipped the rest of a file: %s", error)
            yield RawRow(None, skipped="damaged_file")

    def _row(self, after: FilePosition, raw: RawRow) -> Row:
        if raw.skipped is not None:
            return Row(after._asdict(), skipped=raw.skipped)
        text, reason = self._filter.apply(raw.value, raw.score)
        return Row(after._asdict(), text=text, skipped=reason)

    def _judge_file(self, file: DocumentFile, counts: Counter[str | None]) -> None:
        """Raise or log if a file has rows, and none is a document: it has other columns or another format.

        Rows that the config leaves out, by length or split, are documents. A text file is one row, which is
        judged as a row.
        """
        has_columns = isinstance(self._options, ColumnOptions)
        if not has_columns or not counts or any(reason not in DEFECTS for reason in counts):
            return
        if self._options.on_damaged_file == "stop":
            remedy = f' or set {called("on_damaged_file")} to "skip"'
            raise UserError(self._no_document(str(file), counts, remedy))
        if self._log_skipped:
            logger.warning("%s holds no document: its %d rows were skipped", file, counts.total())

    def _no_document(self, name: str, counts: Counter[str | None], remedy: str) -> str:
        column = getattr(self._options, "text_column", None)
        hint = "" if column is None else f"; {called('text_column')} is {column!r}"
        hint += "; malformed are lines that are no JSON object" if counts["malformed"] else ""
        return (
            f"{name} holds no document (rows skipped: {_listed(counts)}{hint}): name other files or "
            f"another column,{remedy}"
        )

    def _end_epoch(self, epoch: int, counts: Counter[str | None], is_whole_epoch: bool) -> None:
        """Log the skipped rows of an epoch, and raise if a whole one has no document."""
        num_documents = counts.pop(None, 0)
        if is_whole_epoch and not num_documents:
            raise UserError(self._no_document(str(self), counts, " or relax the filters"))
        if self._log_skipped and any(counts[reason] for reason in DEFECTS):
            skipped = _listed(counts)
            logger.warning(
                "epoch %d of %s: %d documents, rows skipped: %s", epoch, self, num_documents, skipped
            )

    def _log_repetition(self, num_epochs: int) -> None:
        """Log that the source begins again, after 1, 2, 4, 8, ... epochs."""
        if not self._log_skipped or num_epochs & (num_epochs - 1):
            return
        said = f"{self} has been read {'once' if num_epochs == 1 else f'{num_epochs} times'}"
        if num_epochs < WORTHWHILE_EPOCHS:
            logger.info("%s, and is read again", said)
        else:
            logger.warning(
                "%s, and reading it again teaches little: give more documents, or train fewer steps", said
            )


def identify(files: Sequence[DocumentFile]) -> dict[str, Any]:
    """Identify files by their content and order, as `data.fingerprint.fingerprint_files` describes it.

    Args:
        files: The files.

    Raises:
        UserError: A file cannot be read.
    """
    with ThreadPoolExecutor(_IDENTIFY_THREADS) as pool:
        return fingerprint_files(list(pool.map(lambda file: file.identity, files)))


@contextlib.contextmanager
def convert_read_errors(name: Path | str) -> Iterator[None]:
    """Convert a library's errors while reading a file to errors that name the file.

    Args:
        name: The file.

    Raises:
        DamagedFileError: The file's content is damaged.
        UserError: The file cannot be read at all.
    """
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, lzma.LZMAError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # an error of the operating system has an errno, a decoder's OSError has none
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"cannot read {name} ({reason}): the file is gone or unreachable") from error
        raise DamagedFileError(
            f"cannot read {name} ({reason}): the file is damaged; download or write it again, or set "
            f'{called("on_damaged_file")} to "skip"'
        ) from error


def _listed(counts: Counter[str | None]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"


def _position_after(epoch: int, index: int, raw: RawRow) -> FilePosition:
    if raw.next_row is None:
        return FilePosition(epoch, index + 1)
    return FilePosition(epoch, index, raw.next_row)


def _blocks(rows: Iterator[RawRow], row: int) -> Iterator[tuple[int, list[RawRow]]]:
    """Group rows into blocks, each with the number of its first row."""
    block: list[RawRow] = []
    first, characters = row, 0
    for raw in rows:
        block.append(raw)
        characters += len(raw.value) if isinstance(raw.value, (str, bytes)) else 0
        if len(block) >= BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            yield first, block
            first = first if raw.next_row is None else raw.next_row
            block, characters = [], 0
    if block:
        yield first, block
