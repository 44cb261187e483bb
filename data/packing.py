"""Documents to sequences: token streams cut into rows, and rows joined into a micro-batch.

Documents follow one another, each closed by the end-of-document token. With T = seq_len, row n covers the
stream's tokens [n*T, n*T + T] inclusive; its inputs are the first T of them and its labels the last T.
Neighbouring rows so share one token, and every token of the stream but the very first is a label exactly
once.

With document masking, a document's tokens see only tokens of their own document in their own row. The label
at the last token of a document would be the first token of the next one, which nothing in sight predicts: it
is ignored (-100). The end-of-document token itself is a label, predicted from its own document. Without
masking the label across the boundary counts like any other.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

IGNORE_INDEX = -100

MicroBatch: TypeAlias = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A tokenized document and where it came from.

    Attributes:
        tokens: Token ids, int32 `[n]`, the end-of-document token included.
        epoch: Pass over the source, from 0.
        file: Index of its file in the source.
        row: Index of its row in the file.
        skipped: Rows skipped before it since the run began, by reason.
    """

    tokens: np.ndarray
    epoch: int
    file: int
    row: int
    skipped: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One sequence, with the token after it.

    Attributes:
        tokens: int32 `[T + 1]`.
        starts: Indices in 1..T at which a document begins, ascending. Padding counts as a document.
        num_tokens: How many of `tokens` are text; the rest is padding and never a label.
        next_document: The document that the next row's first token is in, None after the last row.
        next_offset: Index of that token in the document.
    """

    tokens: np.ndarray
    starts: tuple[int, ...]
    num_tokens: int
    next_document: Document | None
    next_offset: int


class RowPacker:
    """Cuts a stream of documents into rows; holds no more than the documents it was given and not yet cut."""

    def __init__(self, seq_len: int) -> None:
        """Start an empty stream.

        Args:
            seq_len: Tokens a row, T.

        Raises:
            ValueError: If `seq_len` is below 1.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, must be at least 1: set training.seq_len")
        self._seq_len = seq_len
        self._documents: deque[Document] = deque()
        self._offset = 0
        self._num_tokens = 0

    def add(self, document: Document, *, offset: int = 0) -> None:
        """Append a document to the stream.

        Args:
            document: The document, with at least one token.
            offset: Leave out this many of its first tokens; only the stream's first document may be cut so.
        """
        assert not offset or not self._documents
        assert offset < len(document.tokens)
        if not self._documents:
            self._offset = offset
        self._documents.append(document)
        self._num_tokens += len(document.tokens) - offset

    def pop(self) -> PackedRow | None:
        """Return the next row, or None until there are T + 1 tokens for it."""
        if self._num_tokens < self._seq_len + 1:
            return None
        tokens, starts = self._head(self._seq_len + 1)
        self._advance(self._seq_len)
        return PackedRow(
            tokens=tokens,
            starts=starts,
            num_tokens=len(tokens),
            next_document=self._documents[0],
            next_offset=self._offset,
        )

    def flush(self, padding: int) -> PackedRow | None:
        """Return what is left as one padded row, or None if no label is left; the stream is then empty.

        Args:
            padding: Token id to fill up with.
        """
        assert self._num_tokens <= self._seq_len
        if self._num_tokens < 2:
            return None
        num_tokens = self._num_tokens
        tokens, starts = self._head(num_tokens)
        filler = np.full(self._seq_len + 1 - num_tokens, padding, dtype=np.int32)
        self._documents.clear()
        self._offset = self._num_tokens = 0
        return PackedRow(
            tokens=np.concatenate([tokens, filler]),
            starts=(*starts, num_tokens),
            num_tokens=num_tokens,
            next_document=None,
            next_offset=0,
        )

    def _head(self, length: int) -> tuple[np.ndarray, tuple[int, ...]]:
        pieces: list[np.ndarray] = []
        starts: list[int] = []
        filled, offset = 0, self._offset
        for document in self._documents:
            if filled == length:
                break
            if filled:
                starts.append(filled)
            pieces.append(document.tokens[offset : offset + length - filled])
            filled += len(pieces[-1])
            offset = 0
        return np.concatenate(pieces), tuple(starts)

    def _advance(self, length: int) -> None:
        self._num_tokens -= length
        self._offset += length
        while self._offset >= len(self._documents[0].tokens):
            self._offset -= len(self._documents.popleft().tokens)


def filler_row(seq_len: int, padding: int) -> PackedRow:
    """Return a row of padding without a single label, which evens out the ranks' share of the last rows."""
    tokens = np.full(seq_len + 1, padding, dtype=np.int32)
    return PackedRow(tokens=tokens, starts=(), num_tokens=0, next_document=None, next_offset=0)


def collate(rows: Sequence[PackedRow], *, mask_documents: bool) -> MicroBatch:
    """Join rows into the tensors of one micro-batch.

    Args:
        rows: b rows of the same length T.
        mask_documents: Whether tokens see only their own document.

    Returns:
        The inputs and the labels, -100 where nothing is to be predicted. With masking:
        `{"input": int64 [1, b*T], "cu_seqlens": int32 [N + 1]}` and int64 `[1, b*T]`, where cu_seqlens holds
        every document and row bound from 0 to b*T. Without: `{"input": int64 [b, T]}` and int64 `[b, T]`.
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
