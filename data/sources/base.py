"""What every source of documents gives: rows, each with the position at which reading goes on after it."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

# Plain JSON, small, and only the source that gave it knows what it means.
Position: TypeAlias = dict[str, Any]


class TokenSequence(Protocol):
    """Token ids that may not have been read yet: a numpy array is one."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        ...

    def __getitem__(self, which: slice, /) -> np.ndarray:
        """Return consecutive tokens, an integer array `[n]`."""
        ...


class Row(NamedTuple):
    """One row of a source: a document as text or as tokens, or the reason why it is none.

    Attributes:
        after: Where reading goes on after this row.
        text: The document, if the source holds text.
        tokens: The document with the token that ends it, if the source holds tokens.
        skipped: None for a document, else why there is none (data/sources/filters.py lists the reasons).
    """

    after: Position
    text: str | None = None
    tokens: TokenSequence | None = None
    skipped: str | None = None


class DocumentSource(Protocol):
    """Rows in a fixed order, pass after pass. Its `str` says in an error message what is read."""

    @property
    def fingerprint(self) -> str:
        """A short hash of what a position refers to; a saved position is good for an equal one only."""
        ...

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield every row from a position on, in order; each call starts anew.

        Args:
            position: `after` of the row before the first, from an equal source; None for the start.
            repeat: Whether to begin another pass at the end of each, without end.

        Raises:
            ValueError: If something cannot be read (it is named), or a whole pass holds no document.
        """
        ...


def batches(rows: Iterator[Row], max_rows: int, max_characters: int) -> Iterator[list[Row]]:
    """Group rows: a group ends with the row that brings it to so many rows or characters.

    Args:
        rows: The rows.
        max_rows: Most rows of a group.
        max_characters: Characters at which a group ends.
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
