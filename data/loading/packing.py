"""Documents to sequences: token streams cut into rows, and rows joined into a micro-batch.

Documents follow one another, each closed by the end-of-document token. With T = seq_len, row n covers the
stream's tokens [n*T, n*T + T] inclusive; its inputs are the first T of them and its labels the last T.
Neighbouring rows so share one token, and every token of the stream but the very first is a label exactly
once.

With document masking, a document's tokens see only tokens of their own document in their own row. The label
at the last token of a document would be the first token of the next one, which nothing in sight predicts: it
is ignored (-100). The end-of-document token itself is a label, predicted from its own document. Without
masking the label across the boundary counts like any other.

data/loading/best_fit.py is the other way to make rows. Both need only the lengths of documents: tokens are
looked at where a row is collated, so that stored ones are read by the rank that needs them.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from data.sources.base import Position, TokenSequence

IGNORE_INDEX = -100

MicroBatch: TypeAlias = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A tokenized document and where it came from.

    Attributes:
        tokens: Token ids `[n]`, the end-of-document token included.
        before: Position in the source at which the document is the next row; None for the start.
        after: Position in the source after it.
        skipped: Rows skipped before it since the run began, by reason.
    """

    tokens: TokenSequence
    before: Position | None
    after: Position
    skipped: Mapping[str, int]


class Mark(NamedTuple):
    """From where the row after some row can be made again.

    Attributes:
        position: Position in the source; None for the start.
        offset: What to leave out of what is made from there; each packer says of what.
        skipped: Rows skipped before that position since the run began, by reason.
    """

    position: Position | None
    offset: int
    skipped: Mapping[str, int]


class Piece(NamedTuple):
    """Consecutive tokens of a document, not looked at yet: those from `first` until before `last`."""

    tokens: TokenSequence
    first: int
    last: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One sequence, with the token after it.

    Attributes:
        pieces: The text, in order, each piece of another document.
        seq_len: Length T of the sequence.
        padding: Token id that fills up T + 1 tokens where the text does not.
    """

    pieces: tuple[Piece, ...]
    seq_len: int
    padding: int

    @property
    def num_tokens(self) -> int:
        """How many of the tokens are text; the rest is padding and never a label."""
        return sum(piece.last - piece.first for piece in self.pieces)

    @property
    def starts(self) -> tuple[int, ...]:
        """Indices in 1..T at which a document begins, ascending. Padding counts as a document."""
        ends = accumulate(piece.last - piece.first for piece in self.pieces)
        return tuple(end for end in ends if end <= self.seq_len)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens and padding, int32 `[T + 1]`; stored tokens are read now.

        Raises:
            ValueError: If they are damaged.
        """
        row = np.full(self.seq_len + 1, self.padding, dtype=np.int32)
        filled = 0
        for tokens, first, last in self.pieces:
            row[filled : filled + last - first] = tokens[first:last]
            filled += last - first
        return row


class Packer(Protocol):
    """A way to make rows of documents."""

    @property
    def name(self) -> str:
        """What a saved position is good for: packers of one name go on from each other's marks."""
        ...

    def pack(self, documents: Iterable[Document], start: Mark) -> Iterator[tuple[PackedRow, Mark | None]]:
        """Make rows.

        Args:
            documents: Read from the mark's position on, in order.
            start: Where to begin.

        Yields:
            Each row, and the mark of the next one, None if no other follows.

        Raises:
            ValueError: If the documents are not those of the mark.
        """
        ...


class ConcatenatePacker:
    """Cuts a stream of documents every T tokens; a mark's offset counts tokens of its document.

    It holds no more than the documents that a row needs.
    """

    name = "concatenate"

    def __init__(self, seq_len: int, padding: int) -> None:
        """Describe the rows.

        Args:
            seq_len: Tokens a row, T.
            padding: Token id that fills up the last row.

        Raises:
            ValueError: If `seq_len` is below 1.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, must be at least 1: set training.seq_len")
        self._seq_len = seq_len
        self._padding = padding

    def pack(self, documents: Iterable[Document], start: Mark) -> Iterator[tuple[PackedRow, Mark | None]]:
        """Make rows, as `Packer` says."""
        waiting: deque[Document] = deque()
        offset, num_tokens = start.offset, -start.offset
        for document in documents:
            if offset and not waiting:
                _check_start(document, start)
            waiting.append(document)
            num_tokens += len(document.tokens)
            while num_tokens > self._seq_len:
                row = self._row(waiting, offset, self._seq_len + 1)
                num_tokens -= self._seq_len
                offset += self._seq_len
                while offset >= len(waiting[0].tokens):
                    offset -= len(waiting.popleft().tokens)
                yield row, Mark(waiting[0].before, offset, waiting[0].skipped)
        # The row before had the first token as its last label.
        if num_tokens >= 2:
            yield self._row(waiting, offset, num_tokens), None

    def _row(self, documents: Iterable[Document], offset: int, length: int) -> PackedRow:
        pieces: list[Piece] = []
        for document in documents:
            if not length:
                break
            last = min(len(document.tokens), offset + length)
            pieces.append(Piece(document.tokens, offset, last))
            length -= last - offset
            offset = 0
        return PackedRow(pieces=tuple(pieces), seq_len=self._seq_len, padding=self._padding)


def filler_row(seq_len: int, padding: int) -> PackedRow:
    """Return a row of padding without a single label, which evens out the ranks' share of the last rows."""
    return PackedRow(pieces=(), seq_len=seq_len, padding=padding)


def collate(rows: Sequence[PackedRow], *, mask_documents: bool) -> MicroBatch:
    """Join rows into the tensors of one micro-batch.

    Args:
        rows: b rows of the same length T.
        mask_documents: Whether tokens see only their own document.

    Returns:
        The inputs and the labels, -100 where nothing is to be predicted. With masking:
        `{"input": int64 [1, b*T], "cu_seqlens": int32 [N + 1]}` and int64 `[1, b*T]`, where cu_seqlens holds
        every document and row bound from 0 to b*T. Without: `{"input": int64 [b, T]}` and int64 `[b, T]`.

    Raises:
        ValueError: If stored tokens are damaged.
    """
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64))
    seq_len = tokens.shape[1] - 1
    # Copies: of a single row both slices would be contiguous views of the same memory.
    inputs, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    bounds: list[int] = []
    for index, row in enumerate(rows):
        labels[index, max(row.num_tokens - 1, 0) :] = IGNORE_INDEX
        bounds.append(index * seq_len)
        if mask_documents and row.starts:
            labels[index, torch.tensor(row.starts) - 1] = IGNORE_INDEX
            bounds.extend(index * seq_len + start for start in row.starts if start < seq_len)
    if not mask_documents:
        return {"input": inputs}, labels
    bounds.append(len(rows) * seq_len)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return {"input": inputs.reshape(1, -1), "cu_seqlens": cu_seqlens}, labels.reshape(1, -1)


def _check_start(document: Document, start: Mark) -> None:
    if document.before != start.position or start.offset >= len(document.tokens):
        raise ValueError(
            f"the saved data position is token {start.offset} of the document at {start.position}, but found "
            f"was one of {len(document.tokens)} tokens at {document.before}: the files or the tokenizer "
            "changed since the checkpoint"
        )
