"""Pack documents into rows, and collate rows into micro-batches.

Documents are concatenated, each ending with the end-of-document token. With T = seq_len, row n holds the
stream's tokens n*T to (n+1)*T inclusive; its inputs are the first T of them and its labels the last T.
Consecutive rows thus share one token, and every token of the stream but the first is a label exactly once.

With document masking, a token attends only to its own document within its row. The label at the last token of
a document would be the first token of the next document, which cannot be predicted from what is attended to:
it is IGNORE_INDEX. The end-of-document token itself is a label, predicted from its own document. Without
masking, labels across document boundaries count too.

data/loading/best_fit.py is the other packer. Both need only the lengths of documents: tokens are read when a
row is collated, so that each rank reads stored tokens of its own rows only.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from data.sources.base import Position, TokenSequence
from errors import UserError
from tokens import IGNORE_INDEX

MicroBatch: TypeAlias = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A tokenized document and its place in the source.

    Attributes:
        tokens: Token ids `[n]`, the end-of-document token included.
        position: Position in the source from which reading yields the document first; None for the start.
        next_position: Position after the document.
        skipped: Rows skipped before the document since the start of the run, by reason.
    """

    tokens: TokenSequence
    position: Position | None
    next_position: Position
    skipped: Mapping[str, int]


class PackerState(NamedTuple):
    """State from which a packer resumes: the next row's place in the source.

    Attributes:
        position: Position in the source to read from; None for the start.
        offset: What to drop from there, in the packer's own unit.
        skipped: Rows skipped before that position since the start of the run, by reason.
    """

    position: Position | None
    offset: int
    skipped: Mapping[str, int]


class Segment(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a document, not read yet."""

    tokens: TokenSequence
    start: int
    stop: int


class RowSegments(Protocol):
    """The segments of a row, of different documents, in order."""

    @property
    def lengths(self) -> Sequence[int]:
        """Number of tokens of each segment."""
        ...

    def __iter__(self) -> Iterator[Segment]:
        """Iterate over the segments."""
        ...


class SegmentTuple(tuple[Segment, ...]):
    """Segments that are made already."""

    __slots__ = ()

    @property
    def lengths(self) -> Sequence[int]:
        """Number of tokens of each segment."""
        return [segment.stop - segment.start for segment in self]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """A row of T + 1 tokens: T inputs and, shifted by one, T labels.

    Attributes:
        segments: What it holds of documents.
        seq_len: Length T of the sequence.
        padding_id: Token id that fills the rest of the T + 1 tokens.
    """

    segments: RowSegments
    seq_len: int
    padding_id: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding; padding is never a label."""
        return sum(self.segments.lengths)

    @property
    def num_pairs(self) -> int:
        """Pairs of tokens that attend to each other if documents are masked, without those of padding."""
        return sum(length * (length + 1) // 2 for length in self.segments.lengths)

    @property
    def document_starts(self) -> tuple[int, ...]:
        """Indices from 1 to T at which a document starts, ascending; padding counts as a document."""
        return tuple(end for end in accumulate(self.segments.lengths) if end <= self.seq_len)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens and padding, int32 `[T + 1]`; reads stored tokens.

        Raises:
            UserError: Stored tokens are damaged.
        """
        row = np.full(self.seq_len + 1, self.padding_id, dtype=np.int32)
        filled = 0
        for tokens, start, stop in self.segments:
            row[filled : filled + stop - start] = tokens[start:stop]
            filled += stop - start
        return row


class Rows(Protocol):
    """Rows that may be made on access; a list is one."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int, /) -> PackedRow:
        """Return a row."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBlock:
    """Consecutive rows.

    Attributes:
        rows: The rows.
        next: State of the row after them.
        rows_left: Estimate of the rows from there to the end of the epoch; infinite if not known.
        ends_epoch: Whether their last row holds the last token of an epoch.
    """

    rows: Rows
    next: PackerState
    rows_left: float = math.inf
    ends_epoch: bool = False


class Packer(Protocol):
    """Packs documents into rows."""

    @property
    def fingerprint(self) -> str:
        """Name of the packing; a saved state is valid for a packer of the same one."""
        ...

    def pack(
        self, documents: Iterable[Document], state: PackerState
    ) -> Iterator[tuple[PackedRow, PackerState | None]]:
        """Yield each row with the state of the next one, None after the last.

        Args:
            documents: Documents from the state's position on, in order.
            state: State of the first row.

        Raises:
            UserError: The documents have changed since the state was saved.
        """
        ...


class ConcatenatePacker:
    """Split the concatenated documents every T tokens; a state's offset counts tokens of its document.

    It holds no more documents than a row needs.

    Args:
        seq_len: Tokens per row, T.
        padding_id: Token id that fills the last row.

    Raises:
        UserError: `seq_len` is below 1.
    """

    fingerprint = "concatenate"

    def __init__(self, seq_len: int, padding_id: int) -> None:
        check_seq_len(seq_len)
        self._seq_len = seq_len
        self._padding_id = padding_id

    def pack(
        self, documents: Iterable[Document], state: PackerState
    ) -> Iterator[tuple[PackedRow, PackerState | None]]:
        """Yield each row with the state of the next one, as `Packer.pack` does."""
        pending: deque[Document] = deque()
        offset, num_tokens = state.offset, -state.offset
        for document in documents:
            if offset and not pending:
                _check_resumed(document, state)
            pending.append(document)
            num_tokens += len(document.tokens)
            while num_tokens > self._seq_len:
                row = self._row(pending, offset, self._seq_len + 1)
                num_tokens -= self._seq_len
                offset += self._seq_len
                while offset >= len(pending[0].tokens):
                    offset -= len(pending.popleft().tokens)
                yield row, PackerState(pending[0].position, offset, pending[0].skipped)
        # a single remaining token is the last label of the previous row
        if num_tokens >= 2:
            yield self._row(pending, offset, num_tokens), None

    def _row(self, documents: Iterable[Document], offset: int, length: int) -> PackedRow:
        segments: list[Segment] = []
        for document in documents:
            if not length:
                break
            stop = min(len(document.tokens), offset + length)
            segments.append(Segment(document.tokens, offset, stop))
            length -= stop - offset
            offset = 0
        return PackedRow(segments=SegmentTuple(segments), seq_len=self._seq_len, padding_id=self._padding_id)


def check_seq_len(seq_len: int) -> None:
    """Check that rows are not empty.

    Raises:
        UserError: `seq_len` is below 1.
    """
    if seq_len < 1:
        raise UserError(f"seq_len is {seq_len}, must be at least 1: set training.seq_len")


def padding_row(seq_len: int, padding_id: int) -> PackedRow:
    """Return a row of padding without labels, which fills up the last micro-batch."""
    return PackedRow(segments=SegmentTuple(), seq_len=seq_len, padding_id=padding_id)


def collate(rows: Sequence[PackedRow], *, mask_documents: bool) -> MicroBatch:
    """Collate rows into the tensors of a micro-batch.

    Args:
        rows: b rows of the same length T.
        mask_documents: Whether a token attends only to its own document.

    Returns:
        Inputs and labels; labels are IGNORE_INDEX where nothing is predicted. With masking:
        `{"input": int64 [1, b*T], "cu_seqlens": int32 [N + 1]}` and int64 `[1, b*T]`, where cu_seqlens holds
        every document and row boundary from 0 to b*T. Without: `{"input": int64 [b, T]}` and int64 `[b, T]`.

    Raises:
        UserError: Stored tokens are damaged.
    """
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64))
    seq_len = tokens.shape[1] - 1
    # copies: both slices of a single row would be contiguous views of the same memory
    inputs, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    boundaries: list[int] = []
    for index, row in enumerate(rows):
        labels[index, max(row.num_tokens - 1, 0) :] = IGNORE_INDEX
        boundaries.append(index * seq_len)
        starts = row.document_starts
        if mask_documents and starts:
            labels[index, torch.tensor(starts) - 1] = IGNORE_INDEX
            boundaries.extend(index * seq_len + start for start in starts if start < seq_len)
    if not mask_documents:
        return {"input": inputs}, labels
    boundaries.append(len(rows) * seq_len)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    return {"input": inputs.reshape(1, -1), "cu_seqlens": cu_seqlens}, labels.reshape(1, -1)


def _check_resumed(document: Document, state: PackerState) -> None:
    if document.position != state.position or state.offset >= len(document.tokens):
        raise UserError(
            f"the saved data position is token {state.offset} of the document at {state.position}, but the "
            f"document there, at {document.position}, has {len(document.tokens)} tokens: the files or the "
            "tokenizer changed since the checkpoint"
        )
