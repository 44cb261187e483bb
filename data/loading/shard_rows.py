"""Rows of prepared shards, laid out block by block from the lengths of documents; their tokens stay unread.

A block is 512 rows or somewhat more. The last block of an epoch ends where the epoch does:

* "concatenate": with the row in which the epoch's last token is a label. That row is filled up with the next
  epoch's first documents, and the next epoch's first row starts where it ends.
* "best_fit": with the epoch's last document. The last block takes what would be less than a block, and the
  free space of its rows is padding, as in every block.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np

from data.loading.layout import LaidOutRows, RowLayout, best_fit_layout, concatenated_layout
from data.loading.packing import PackerState, RowBlock, check_seq_len
from data.sources.base import Position
from data.sources.shards import ShardDocuments
from errors import UserError

BLOCK_ROWS = 512

Packing: TypeAlias = Literal["concatenate", "best_fit"]

# `skipped` counts the damaged documents since the start of the run that precede this one
_PLACED = np.dtype([(name, np.int64) for name in ("epoch", "place", "number", "length", "skipped")])


class ShardRows:
    """Rows of shards in the order of the documents, without end.

    Args:
        source: The documents.
        packing: How they are packed into rows.
        seq_len: Tokens per row, T.
        padding_id: Token id that fills the free space of rows.

    Raises:
        UserError: `seq_len` is below 1.
    """

    def __init__(self, source: ShardDocuments, *, packing: Packing, seq_len: int, padding_id: int) -> None:
        check_seq_len(seq_len)
        self._source = source
        self._packing = packing
        self._seq_len = seq_len
        self._padding_id = padding_id

    def blocks(self, start: PackerState) -> Iterator[RowBlock]:
        """Yield blocks of rows.

        Args:
            start: State of the first row; the start of a block.

        Raises:
            UserError: Every document of an epoch is damaged, or the documents have changed since the state
                was saved.
        """
        documents = _Documents(self._source, start)
        if self._packing == "concatenate":
            return self._concatenate(documents, start)
        return self._best_fit(documents)

    def _concatenate(self, documents: "_Documents", start: PackerState) -> Iterator[RowBlock]:
        offset = start.offset
        while True:
            documents.read_rows(offset, self._seq_len)
            lengths, epochs = documents.pending["length"], documents.pending["epoch"]
            if offset >= lengths[0]:
                raise UserError(
                    f"the saved data position is token {offset} of the document at {start.position}, which "
                    f"has {lengths[0]} tokens: the shards changed since the checkpoint"
                )
            epoch_ends = np.cumsum(lengths)[:-1][np.diff(epochs) > 0] - offset
            # a single remaining token is the last label of the previous row
            epoch_rows = -(-(epoch_ends[epoch_ends > 1] - 1) // self._seq_len)
            num_rows = min([BLOCK_ROWS, *epoch_rows[:1].tolist()])
            layout = concatenated_layout(lengths, offset, num_rows, self._seq_len)
            next_token = offset + num_rows * self._seq_len
            ends = np.cumsum(lengths)
            num_read = int(np.searchsorted(ends, next_token, side="right"))
            next_offset = next_token - int(ends[num_read] - lengths[num_read])
            ends_epoch = num_rows in epoch_rows[:1].tolist()
            yield self._block(documents, layout, num_read, next_offset, ends_epoch=ends_epoch)
            offset = next_offset

    def _best_fit(self, documents: "_Documents") -> Iterator[RowBlock]:
        block_tokens = BLOCK_ROWS * self._seq_len
        while True:
            num_documents, ends_epoch = documents.block(block_tokens)
            layout = best_fit_layout(documents.pending["length"][:num_documents], self._seq_len)
            yield self._block(documents, layout, num_documents, 0, ends_epoch=ends_epoch)

    def _block(
        self, documents: "_Documents", layout: RowLayout, num_read: int, offset: int, *, ends_epoch: bool
    ) -> RowBlock:
        """Make a block of rows, and drop the documents that precede the next one."""
        numbers = documents.pending["number"][layout.documents]
        rows = LaidOutRows(
            replace(layout, documents=numbers),
            self._source.tokens,
            seq_len=self._seq_len,
            padding_id=self._padding_id,
        )
        position, skipped = documents.drop(num_read)
        tokens_left = documents.tokens_left(position["place"])
        return RowBlock(
            rows=rows,
            next=PackerState(position, offset, skipped),
            rows_left=tokens_left / self._seq_len,
            ends_epoch=ends_epoch,
        )


class _Documents:
    """Places and lengths of the documents from a state on, read as far as they are needed.

    Args:
        source: The documents.
        start: State of the first row.
    """

    def __init__(self, source: ShardDocuments, start: PackerState) -> None:
        self._source = source
        self._chunks = source.chunks(start.position, repeat=True)
        self._skipped = dict(start.skipped)
        self._num_damaged = 0
        self._last_epoch: int | None = None
        # joined when they are looked at: a row may hold many epochs of a single document, each a chunk
        self._read = [np.empty(0, dtype=_PLACED)]

    @property
    def pending(self) -> np.ndarray:
        """The documents read and not dropped, of dtype `_PLACED`."""
        if len(self._read) > 1:
            self._read = [np.concatenate(self._read)]
        return self._read[0]

    def read_rows(self, offset: int, seq_len: int) -> None:
        """Read the documents of a block of rows, which ends with the row in which an epoch does.

        Args:
            offset: Tokens of the first document that precede the first row.
            seq_len: Tokens per row, T.
        """
        ends = np.cumsum(self.pending["length"])
        num_tokens = int(ends[-1]) if len(ends) else 0
        epoch_ends = ends[:-1][np.diff(self.pending["epoch"]) > 0].tolist()
        num_rows = BLOCK_ROWS
        while True:
            # a single remaining token is the last label of the previous row
            rows = [-(-(end - offset - 1) // seq_len) for end in epoch_ends if end > offset + 1]
            num_rows = min([num_rows, *rows])
            # one token more than the rows need: the document after the epoch's last one is then known
            if num_tokens >= offset + num_rows * seq_len + 2:
                return
            last_epoch = self._last_epoch
            chunk_tokens = self._read_chunk()
            epoch_ends = [] if self._last_epoch == last_epoch else [num_tokens]
            num_tokens += chunk_tokens

    def block(self, num_tokens: int) -> tuple[int, bool]:
        """Read the documents of a block: of so many tokens, or to the epoch's end if fewer would remain.

        Returns:
            The number of documents, and whether the epoch ends with them.
        """
        while True:
            epochs = self.pending["epoch"]
            num_same = int(np.searchsorted(epochs, epochs[0], side="right")) if len(epochs) else 0
            ends = np.cumsum(self.pending["length"][:num_same])
            num = int(np.searchsorted(ends, num_tokens)) + 1
            if num <= num_same and self.tokens_left(int(self.pending["place"][num - 1]) + 1) >= num_tokens:
                return num, False
            if num_same < len(epochs):
                return num_same, True
            missing = num_tokens - (int(ends[-1]) if num_same else 0)
            while True:
                last_epoch = self._last_epoch
                missing -= self._read_chunk()
                if missing <= 0 or self._last_epoch != last_epoch:
                    break

    def drop(self, num_documents: int) -> tuple[Position, dict[str, int]]:
        """Drop documents; return the position of the next one, and the number skipped before it."""
        self._read = [self.pending[num_documents:]]
        while not len(self.pending):
            self._read_chunk()
        first = self.pending[0]
        skipped = dict(self._skipped)
        if first["skipped"]:
            skipped["damaged_document"] = skipped.get("damaged_document", 0) + int(first["skipped"])
        return {"epoch": int(first["epoch"]), "place": int(first["place"])}, skipped

    def tokens_left(self, place: int) -> float:
        """Estimate the tokens from a place to the end of its epoch, by the mean length of a document."""
        num_documents = self._source.num_documents
        return (num_documents - place) * self._source.num_tokens / num_documents

    def _read_chunk(self) -> int:
        """Read some documents of one epoch, good ones or not; return the tokens of the good ones."""
        chunk = next(self._chunks)
        num_damaged = self._num_damaged + np.cumsum(chunk.is_damaged)
        self._num_damaged += int(chunk.is_damaged.sum())
        good = np.flatnonzero(~chunk.is_damaged)
        placed = np.empty(len(good), dtype=_PLACED)
        placed["epoch"], placed["place"] = chunk.epoch, chunk.place + good
        placed["number"], placed["skipped"] = chunk.numbers[good], num_damaged[good]
        placed["length"] = self._source.lengths(chunk.numbers[good])
        self._read.append(placed)
        if len(placed):
            self._last_epoch = chunk.epoch
        return int(placed["length"].sum())
