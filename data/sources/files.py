"""A list of files as a source of documents: passes over it, damage, and an order that resumes exactly.

Without a seed rows come as they lie. With a seed every pass reads the files in another permuted order, and
permutes the rows within blocks of 8,192 consecutive ones (fewer where they are long: a block ends with the
row that brings it to 64M characters). That approximates a shuffle: rows of one block stay near each other.
A position then names the block and how many of its rows were taken, so that reading goes on exactly; the
block is read again and nothing else is kept.
"""

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from data.config import Split, TextOptions
from data.permutation import Permutation
from data.sources.base import Position, Row
from data.sources.filters import DEFECTS, Filter

logger = logging.getLogger(__name__)

BLOCK_ROWS = 8192
BLOCK_CHARACTERS = 1 << 26

# Options that a run may change on its way: files count by their identity, and damage keeps its place.
_NO_IDENTITY = ("files", "folder", "on_damaged_file")


class DamagedFileError(ValueError):
    """A file that is there does not hold what it should; the message names it."""


class RawRow(NamedTuple):
    """A row as a file holds it.

    Attributes:
        next_row: Where reading of the file goes on; None at the end of a damaged file.
        value: The text, as the file gives it.
        score: Its quality score, as the file gives it.
        skipped: A reason why the row is no document that the file itself found.
    """

    next_row: int | None
    value: object = None
    score: object = None
    skipped: str | None = None


class DocumentFile(Protocol):
    """One file of documents. Its `str` names it in error messages."""

    @property
    def identity(self) -> list[Any]:
        """What tells this file from another one of a data set that may have moved, as plain JSON."""
        ...

    def check(self) -> None:
        """Find out as much about the file as is known without reading it.

        Raises:
            DamagedFileError: If it is damaged.
            ValueError: If it lacks a column.
        """
        ...

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield every row from one on.

        Args:
            row: 0 for the first, else a `next_row`.

        Raises:
            DamagedFileError: If the file is damaged.
            ValueError: If the file is gone, or cannot be fetched.
        """
        ...

    def share_before(self, row: int) -> float:
        """Return about how much of the file lies before a row, from 0 to 1."""
        ...

    def prefetch(self) -> None:
        """Begin to fetch what reading needs, in the background."""
        ...


class Place(NamedTuple):
    """A position in passes over a list of files.

    Attributes:
        epoch: Pass, from 0.
        file: Index of the file in the pass's order.
        row: Row of the file to begin with; with shuffling the first row of a block.
        taken: Rows of that block that were taken; 0 without shuffling.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    taken: int = 0


class FileDocuments:
    """The documents of a list of files, readable from any position on."""

    def __init__(
        self,
        files: Sequence[DocumentFile],
        options: TextOptions,
        *,
        description: str,
        split: Split = "all",
        shuffle_seed: int | None = None,
        is_reporter: bool = True,
    ) -> None:
        """Check each file as far as that costs little.

        Args:
            files: The files, in order.
            options: What to leave out.
            description: What error messages call this source.
            split: Which documents to give, by data/sources/split.py.
            shuffle_seed: Seed of the order; None for the order in which rows lie.
            is_reporter: Whether this process logs what was skipped.

        Raises:
            ValueError: If a file is missing, lacks a column, or is damaged and `options` says to stop.
        """
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
        self._is_reporter = is_reporter
        for file in files:
            try:
                file.check()
            except DamagedFileError:
                # Where damage is to be skipped, reading will find it again and count it.
                if options.on_damaged_file == "stop":
                    raise

    def __str__(self) -> str:
        """Name the files, shortened if they are many."""
        return self._description

    @property
    def fingerprint(self) -> str:
        """A short hash of the files (not their folders: a data set may move), the filters and the order."""
        options = {name: value for name, value in vars(self._options).items() if name not in _NO_IDENTITY}
        parts = [options, self._filter.split, self._shuffle_seed, [file.identity for file in self.files]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield every row from a position on.

        Args:
            position: `after` of the row before the first; None for the start.
            repeat: Whether to begin another pass at the end of each.

        Raises:
            ValueError: If a file cannot be read, or a whole pass holds no document; names it.
        """
        epoch, start, row, taken = Place(**(position or {}))
        while True:
            counts: Counter[str | None] = Counter()
            is_whole = (start, row, taken) == (0, 0, 0)
            for index in range(start, len(self.files)):
                self._prefetch_after(epoch, index, repeat)
                for each in self._read_file(epoch, index, row, taken):
                    counts[each.skipped] += 1
                    yield each
                row = taken = 0
            self._report(epoch, counts, is_whole)
            if not repeat:
                return
            epoch, start = epoch + 1, 0

    def share_before(self, position: Position | None) -> float:
        """Return about how much of the first pass lies before a position, from 0 to 1."""
        place = Place(**(position or {}))
        if place.epoch or place.file >= len(self.files):
            return 1.0
        return (place.file + self._file(0, place.file).share_before(place.row)) / len(self.files)

    def _file(self, epoch: int, index: int) -> DocumentFile:
        if self._shuffle_seed is None:
            return self.files[index]
        order = Permutation(len(self.files), self._shuffle_seed, "files", epoch)
        return self.files[int(order(np.array([index]))[0])]

    def _prefetch_after(self, epoch: int, index: int, repeat: bool) -> None:
        if index + 1 < len(self.files):
            self._file(epoch, index + 1).prefetch()
        elif repeat:
            self._file(epoch + 1, 0).prefetch()

    def _read_file(self, epoch: int, index: int, row: int, taken: int) -> Iterator[Row]:
        file = self._file(epoch, index)
        if self._shuffle_seed is None:
            for raw in self._rows(file, row):
                yield self._row(_place_after(epoch, index, raw), raw)
            return
        for first, block in _blocks(self._rows(file, row), row):
            order = Permutation(len(block), self._shuffle_seed, "rows", epoch, index, first)
            after_block = _place_after(epoch, index, block[-1])
            for count, which in enumerate(order(np.arange(len(block))).tolist()[taken:], taken + 1):
                after = Place(epoch, index, first, count) if count < len(block) else after_block
                yield self._row(after, block[which])
            taken = 0

    def _rows(self, file: DocumentFile, row: int) -> Iterator[RawRow]:
        try:
            yield from file.read(row)
        except DamagedFileError as error:
            if self._options.on_damaged_file == "stop":
                raise
            if self._is_reporter:
                logger.warning("skipped the rest of a file: %s", error)
            yield RawRow(None, skipped="damaged_file")

    def _row(self, after: Place, raw: RawRow) -> Row:
        if raw.skipped is not None:
            return Row(after._asdict(), skipped=raw.skipped)
        text, reason = self._filter.decide(raw.value, raw.score)
        return Row(after._asdict(), text=text, skipped=reason)

    def _report(self, epoch: int, counts: Counter[str | None], is_whole: bool) -> None:
        num_documents = counts.pop(None, 0)
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
        if is_whole and not num_documents:
            column = getattr(self._options, "text_column", None)
            searched = "" if column is None else f"; text_column is {column!r}"
            raise ValueError(
                f"{self} holds no document (rows skipped: {listed}{searched}): name other files or another "
                "column, or filter less"
            )
        if self._is_reporter and any(counts[reason] for reason in DEFECTS):
            logger.warning(
                "epoch %d of %s: %d documents, rows skipped: %s", epoch, self, num_documents, listed
            )


@contextlib.contextmanager
def reading(name: Path | str) -> Iterator[None]:
    """Turn what a library raises about a file into an error that names the file.

    Args:
        name: The file.

    Raises:
        DamagedFileError: If its content is not what it should be.
        ValueError: If it cannot be read at all.
    """
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # What the operating system says carries its number; a library that meets garbage has none.
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"cannot read {name} ({reason}): the file is gone or out of reach") from error
        raise DamagedFileError(
            f"cannot read {name} ({reason}): the file is damaged; fetch or make it again, or set "
            'on_damaged_file to "skip"'
        ) from error


def _place_after(epoch: int, index: int, raw: RawRow) -> Place:
    return Place(epoch, index + 1) if raw.next_row is None else Place(epoch, index, raw.next_row)


def _blocks(rows: Iterator[RawRow], row: int) -> Iterator[tuple[int, list[RawRow]]]:
    """Group rows, each group with the number of its first row."""
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
