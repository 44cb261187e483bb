"""The stream of packed rows from a source and a tokenizer in order, resumable at any row."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from data.loading.packing import Document, PackedRow, Packer, PackerState, RowBlock
from data.sources.base import DocumentSource, Position, Row, TokenSequence, batches
from data.tokenizer import Tokenizer
from errors import UserError


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """State from which the stream resumes at a row; independent of the number of ranks.

    The field names are keys of saved checkpoints. Shuffled rows resume from the start of their window
    (data/loading/row_shuffle.py), rows in order from the row itself.

    Attributes:
        position: Position in the source of the window, or of the row; None for the start.
        offset: What the packer drops from there: tokens of a document (concatenate) or rows of a block
            (best_fit).
        skipped: Source rows skipped before that position since the start of the run, by reason.
        sequence: Global index of the row.
        window: The window's number, from 0; 0 for rows in order.
        window_rows: Rows of the window; 0 while none of them was served.
        served: Rows of the window served.
        window_skipped: Source rows skipped in the window, by reason.
    """

    position: Position | None = None
    offset: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    sequence: int = 0
    window: int = 0
    window_rows: int = 0
    served: int = 0
    window_skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def packer_state(self) -> PackerState:
        """State of the packer at that position."""
        return PackerState(self.position, self.offset, self.skipped)

    @property
    def num_skipped(self) -> dict[str, int]:
        """Source rows skipped before the row, by reason; those of its window in proportion to `served`."""
        counts = dict(self.skipped)
        for reason, count in self.window_skipped.items():
            counts[reason] = counts.get(reason, 0) + count * self.served // self.window_rows
        return {reason: count for reason, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StreamState":
        """Restore a state from the result of `to_dict`.

        Raises:
            UserError: A field is missing or unknown.
        """
        names = {each.name for each in fields(cls)}
        if set(values) != names:
            raise UserError(
                f"the saved data position has fields {sorted(values)}, expected {sorted(names)}: "
                "it was written by another version"
            )
        return cls(**values)


class RowStream:
    """Rows of T + 1 tokens from a source, in order, each with the state after it.

    Args:
        source: The documents.
        tokenizer: Tokenizes text.
        packer: Packs documents into rows.
    """

    def __init__(self, source: DocumentSource, tokenizer: Tokenizer, packer: Packer) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._packer = packer

    @property
    def fingerprint(self) -> str:
        """Name of the packing; a saved state is valid for a stream of the same one."""
        return self._packer.fingerprint

    def rows(self, start: StreamState) -> Iterator[tuple[PackedRow, StreamState]]:
        """Yield each row from a state on, with the state of the next row.

        Args:
            start: State of the first row.

        Raises:
            UserError: A whole epoch holds no document, or the documents have changed since the state was
                saved.
        """
        packed = self._pack(start.packer_state)
        for sequence, (row, state) in enumerate(packed, start.sequence + 1):
            yield row, StreamState(sequence=sequence, **state._asdict())

    def blocks(self, start: PackerState) -> Iterator[RowBlock]:
        """Yield each row as a block, as `data.loading.row_shuffle.RowSource` does."""
        for row, state in self._pack(start):
            yield RowBlock(rows=[row], next=state)

    def _pack(self, start: PackerState) -> Iterator[tuple[PackedRow, PackerState]]:
        for row, state in self._packer.pack(self._documents(start), start):
            assert state is not None, "the source repeats"
            yield row, state

    def _documents(self, start: PackerState) -> Iterator[Document]:
        """Yield tokenized documents, each with the rows skipped before it."""
        position, skipped = start.position, dict(start.skipped)
        for row, tokens in tokenize(self._source.read(position, repeat=True), self._tokenizer):
            first, position = position, row.next_position
            if row.skipped is not None:
                skipped[row.skipped] = skipped.get(row.skipped, 0) + 1
            else:
                assert tokens is not None
                yield Document(tokens=tokens, position=first, next_position=position, skipped=dict(skipped))


def tokenize(rows: Iterator[Row], tokenizer: Tokenizer) -> Iterator[tuple[Row, TokenSequence | None]]:
    """Yield each row of a source with its tokens, the end-of-document token included; None if it is skipped.

    Args:
        rows: Rows of text or of tokens.
        tokenizer: Tokenizes batches of text, in parallel.
    """
    for batch in batches(rows):
        encoded = iter(tokenizer.encode_batch([row.text for row in batch if row.text is not None]))
        for row in batch:
            tokens = row.tokens
            if row.text is not None:
                tokens = np.array([*next(encoded), tokenizer.end_of_document_id], dtype=np.int32)
            yield row, tokens
