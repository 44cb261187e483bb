"""A source and a tokenizer to a stream of rows that can start at any row's state."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from data.loading.packing import Document, Mark, PackedRow, Packer
from data.sources.base import DocumentSource, Position, batches
from data.tokenizer import Tokenizer

# Enough for every core to tokenize at once, little enough that the first batch does not keep a step waiting.
_ENCODE_CHARACTERS = 1 << 18
_ENCODE_DOCUMENTS = 256


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """From where a row can be made. It says nothing of ranks, so any number of them continues from it.

    Attributes:
        position: Position in the source, as the source gave it; None for the start.
        offset: What to leave out of what is made from there: tokens of a document for concatenated rows, rows
            of a block for best-fit ones.
        sequence: Global index of the row.
        skipped: Source rows skipped before that position since the run began, by reason.
    """

    position: Position | None = None
    offset: int = 0
    sequence: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StreamState":
        """Read back what `to_dict` gave.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        names = {each.name for each in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"the saved data position has fields {sorted(values)}, expected {sorted(names)}: "
                "it was written by another version"
            )
        return cls(**values)


class RowStream:
    """Rows of T + 1 tokens from a source, in order, each with the state that comes after it."""

    def __init__(self, source: DocumentSource, tokenizer: Tokenizer, packer: Packer, *, repeat: bool) -> None:
        """Describe the stream; nothing is read yet.

        Args:
            source: The documents.
            tokenizer: Turns text into tokens.
            packer: Turns documents into rows.
            repeat: Whether to begin again at the end of the source; if not, the last row is padded.
        """
        self._source = source
        self._tokenizer = tokenizer
        self._packer = packer
        self._repeat = repeat

    def rows(self, start: StreamState) -> Iterator[tuple[PackedRow, StreamState]]:
        """Yield each row from a state on, with the state of the row after it.

        Args:
            start: State of the first row.

        Raises:
            ValueError: If a whole pass has no document, or the documents are not those of the state.
        """
        skipped = dict(start.skipped)
        documents = self._documents(start.position, skipped)
        mark = Mark(start.position, start.offset, start.skipped)
        for sequence, (row, after) in enumerate(self._packer.pack(documents, mark), start.sequence + 1):
            if after is None:
                yield row, StreamState(sequence=sequence, skipped=dict(skipped))
            else:
                position, offset, before = after
                yield row, StreamState(position=position, offset=offset, sequence=sequence, skipped=before)

    def _documents(self, position: Position | None, skipped: dict[str, int]) -> Iterator[Document]:
        """Tokenize what is text, and count what is skipped."""
        for batch in batches(
            self._source.read(position, repeat=self._repeat), _ENCODE_DOCUMENTS, _ENCODE_CHARACTERS
        ):
            encoded = iter(self._tokenizer.encode_batch([row.text for row in batch if row.text is not None]))
            for row in batch:
                before, position = position, row.after
                if row.skipped is not None:
                    skipped[row.skipped] = skipped.get(row.skipped, 0) + 1
                    continue
                tokens = row.tokens
                if tokens is None:
                    tokens = np.array([*next(encoded), self._tokenizer.end_of_document_id], dtype=np.int32)
                yield Document(tokens=tokens, before=before, after=row.after, skipped=dict(skipped))
