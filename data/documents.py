"""What every source of documents gives: rows with positions, readable from any of them on."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

SKIP_REASONS = ("null", "empty", "not_text")


class Row(NamedTuple):
    """One row of a source: a document, or the reason why it is none.

    Attributes:
        file: Index of the file in the source's order.
        row: Index of the row in its file.
        text: The document, or None for a row that is skipped.
        skipped: None for a document, else one of `SKIP_REASONS`.
    """

    file: int
    row: int
    text: str | None
    skipped: str | None


class DocumentSource(Protocol):
    """Rows in a fixed order. Its `str` says in an error message what was read."""

    @property
    def fingerprint(self) -> str:
        """A short hash of what a position refers to; a saved position is good for an equal one only."""
        ...

    def read(self, file: int = 0, row: int = 0) -> Iterator[Row]:
        """Yield every row from a position to the end, in order; each call starts anew."""
        ...


def classify(file: int, row: int, value: object) -> Row:
    """Make a row of a raw value: text, or UTF-8 bytes, or else the reason to skip it.

    Args:
        file: Index of the file in the source's order.
        row: Index of the row in its file.
        value: What the row holds.
    """
    if value is None:
        return Row(file, row, None, "null")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return Row(file, row, None, "not_text")
    if not isinstance(value, str):
        return Row(file, row, None, "not_text")
    if not value or value.isspace():
        return Row(file, row, None, "empty")
    return Row(file, row, value, None)
