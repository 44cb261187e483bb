"""The interface of a source of documents: rows in a fixed order, each with the position after it."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

BATCH_CHARACTERS, BATCH_ROWS = 1 << 18, 256
"""Of a batch: enough for every core to tokenize, and few enough that a step soon gets its first one."""

WORTHWHILE_EPOCHS = 4
"""Data read as often is almost as good as new, and soon after teaches nothing (arXiv 2305.16264)."""

# small and plain JSON; its keys are private to the source that returned it
Position: TypeAlias = dict[str, Any]


class TokenSequence(Protocol):
    """Token ids that may be read lazily; a numpy array is one."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        ...

    def __getitem__(self, which: slice, /) -> np.ndarray:
        """Return consecutive tokens, an integer array `[n]`."""
        ...


class Row(NamedTuple):
    """One row of a source: a document as text or as tokens, or the reason why the row is skipped.

    Attributes:
        next_position: Position of the next row, from which reading resumes.
        text: The document, if the source holds text.
        tokens: The document with its end-of-document token, if the source holds tokens.
        skipped: None for a document, else one of `data.sources.filters.SKIP_REASONS`.
    """

    next_position: Position
    text: str | None = None
    tokens: TokenSequence | None = None
    skipped: str | None = None


class DocumentSource(Protocol):
    """Rows in a fixed order, epoch after epoch. Its `str` names it in error messages."""

    @property
    def fingerprint(self) -> str:
        """What determines the documents and their order, from `data.fingerprint.join_parts`, or a hash of it.

        A saved position is valid for a source of the same fingerprint.
        """
        ...

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield rows in order from a position; each call returns an independent iterator.

        Args:
            position: A row's `next_position`, from a source of the same fingerprint; None for the start.
            repeat: Whether to start another epoch at the end of each, without end.

        Raises:
            UserError: A file cannot be read (the message names it), or a whole epoch holds no document.
        """
        ...

    def progress(self, position: Position | None) -> float:
        """Return the approximate fraction of the first epoch that precedes a position, from 0 to 1.

        Args:
            position: A row's `next_position`; None for the start.
        """
        ...


def batches(
    rows: Iterator[Row], max_rows: int = BATCH_ROWS, max_characters: int = BATCH_CHARACTERS
) -> Iterator[list[Row]]:
    """Group rows into batches to tokenize; a batch ends with the row that reaches either limit.

    Args:
        rows: The rows.
        max_rows: Rows of a full batch.
        max_characters: Characters of a full batch; the last row may exceed it.
    """
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text or "")
        if characters >= max_characters or len(batch) >= max_rows:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
