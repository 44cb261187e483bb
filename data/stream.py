"""A source and a tokenizer to an endless or single pass of rows, startable at any row's state."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from data.documents import SKIP_REASONS, DocumentSource, Row
from data.packing import Document, PackedRow, RowPacker
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Enough for every core to tokenize at once, little enough that the first batch does not keep a step waiting.
_ENCODE_CHARACTERS = 1 << 18
_ENCODE_DOCUMENTS = 256


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where in the stream a row begins. It says nothing of ranks, so any number of them continues from it.

    Attributes:
        epoch: Pass over the source, from 0.
        file: Index of the file that holds the row's first token.
        row: Index of that token's document in the file.
        offset: Index of that token in its document.
        sequence: Global index of the row.
        skipped: Source rows skipped before that document since the run began, by reason.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    offset: int = 0
    sequence: int = 0
    skipped: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SKIP_REASONS, 0))

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

    def __init__(
        self, source: DocumentSource, tokenizer: Tokenizer, *, seq_len: int, repeat: bool, is_reporter: bool
    ) -> None:
        """Describe the stream; nothing is read yet.

        Args:
            source: The documents.
            tokenizer: Turns them into tokens.
            seq_len: Tokens a row, T.
            repeat: Whether to begin again at the end of the source; if not, the last row is padded.
            is_reporter: Whether this process logs the rows skipped in each epoch.
        """
        self.source = source
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.repeat = repeat
        self.is_reporter = is_reporter

    def rows(self, start: StreamState) -> Iterator[tuple[PackedRow, StreamState]]:
        """Yield each row from a state on, with the state of the row after it.

        Args:
            start: State of the first row.

        Raises:
            ValueError: If a whole epoch has no document, or the documents are not those of the state.
        """
        packer = RowPacker(self.seq_len)
        sequence, offset = start.sequence, start.offset
        skipped = dict(start.skipped)
        for document in self._documents(start, skipped):
            if offset:
                self._check_start(document, start)
            packer.add(document, offset=offset)
            offset = 0
            while (row := packer.pop()) is not None:
                sequence += 1
                yield row, _state_after(row, sequence)
        last = packer.flush(self.tokenizer.end_of_document_id)
        if last is not None:
            yield last, StreamState(epoch=1, sequence=sequence + 1, skipped=dict(skipped))

    def _documents(self, start: StreamState, skipped: dict[str, int]) -> Iterator[Document]:
        epoch, file, row = start.epoch, start.file, start.row
        while True:
            is_whole = (file, row) == (0, 0)
            before = dict(skipped)
            num_documents = 0
            for batch in _batches(self.source.read(file, row)):
                texts = [each.text for each in batch if each.text is not None]
                encoded = iter(self.tokenizer.encode_batch(texts))
                for each in batch:
                    if each.skipped is not None:
                        skipped[each.skipped] += 1
                        continue
                    tokens = np.array([*next(encoded), self.tokenizer.end_of_document_id], dtype=np.int32)
                    num_documents += 1
                    yield Document(
                        tokens=tokens, epoch=epoch, file=each.file, row=each.row, skipped=dict(skipped)
                    )
            dropped = {
                reason: count - before[reason] for reason, count in skipped.items() if count > before[reason]
            }
            self._report(epoch, num_documents, dropped, is_whole=is_whole)
            if not self.repeat:
                return
            epoch, file, row = epoch + 1, 0, 0

    def _report(self, epoch: int, num_documents: int, dropped: dict[str, int], *, is_whole: bool) -> None:
        listed = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
        if is_whole and not num_documents:
            raise ValueError(
                f"{self.source} holds no document (rows skipped: {listed}): "
                "name other files or another column"
            )
        if dropped and self.is_reporter:
            logger.warning(
                "epoch %d of %s: %d documents, rows skipped: %s", epoch, self.source, num_documents, listed
            )

    def _check_start(self, document: Document, start: StreamState) -> None:
        found = (document.file, document.row)
        if found != (start.file, start.row) or start.offset >= len(document.tokens):
            raise ValueError(
                f"the saved data position is token {start.offset} of row {start.row} in file {start.file}, "
                f"but found was row {document.row} in file {document.file} with {len(document.tokens)} "
                "tokens: the files or the tokenizer changed since the checkpoint"
            )


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text or "")
        if characters >= _ENCODE_CHARACTERS or len(batch) >= _ENCODE_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _state_after(row: PackedRow, sequence: int) -> StreamState:
    document = row.next_document
    assert document is not None
    return StreamState(
        epoch=document.epoch,
        file=document.file,
        row=document.row,
        offset=row.next_offset,
        sequence=sequence,
        skipped=document.skipped,
    )
