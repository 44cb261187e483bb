"""The layout of rows, from the lengths of documents alone: which tokens of which documents make up each row.

It is held as arrays, about 16 bytes per piece of a document, so that a large window of rows takes a few MB.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from data.loading.best_fit import pack_block
from data.loading.packing import PackedRow, Segment
from data.sources.base import TokenSequence


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """Pieces of documents by row, all rows' in order.

    Attributes:
        documents: Document of each piece, int64 `[n]`.
        starts: First token of each piece in its document, uint32 `[n]`.
        stops: End (exclusive) of each piece in its document, uint32 `[n]`.
        firsts: Index of each row's first piece, then n, int64 `[rows + 1]`.
    """

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    firsts: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.firsts) - 1


def concatenated_layout(lengths: np.ndarray, offset: int, num_rows: int, seq_len: int) -> RowLayout:
    """Lay out rows as `data.loading.packing.ConcatenatePacker` packs them, split every T tokens.

    Args:
        lengths: Length of each document in tokens, int64 `[d]`.
        offset: Tokens of the first document that precede the first row.
        num_rows: Number of rows; the documents must hold num_rows * T + 1 tokens after the offset.
        seq_len: Tokens per row, T.

    Returns:
        The rows, with the indices of the documents among the given ones.
    """
    ends = np.cumsum(lengths) - offset
    assert ends[-1] > num_rows * seq_len
    row_starts = np.arange(num_rows, dtype=np.int64) * seq_len
    # a row holds the token at row_start + T too, its last label and the next row's first input
    first_documents = np.searchsorted(ends, row_starts, side="right")
    last_documents = np.searchsorted(ends, row_starts + seq_len, side="right")
    counts = last_documents - first_documents + 1
    firsts = np.concatenate([[0], np.cumsum(counts)])
    documents = np.arange(firsts[-1]) + np.repeat(first_documents - firsts[:-1], counts)
    # in tokens since the start of each piece's document
    from_document = np.repeat(row_starts, counts) - (ends - lengths)[documents]
    return RowLayout(
        documents=documents,
        starts=np.maximum(from_document, 0).astype(np.uint32),
        stops=np.minimum(from_document + seq_len + 1, lengths[documents]).astype(np.uint32),
        firsts=firsts,
    )


def best_fit_layout(lengths: np.ndarray, seq_len: int) -> RowLayout:
    """Lay out the rows of one block as `data.loading.best_fit.BestFitPacker` packs them.

    Args:
        lengths: Length of each document of the block in tokens, int64 `[d]`.
        seq_len: Tokens per row, T.

    Returns:
        The rows, with the indices of the documents among the given ones.
    """
    rows = pack_block(lengths.tolist(), seq_len)
    pieces = np.array(list(chain.from_iterable(rows)), dtype=np.int64).reshape(-1, 3)
    return RowLayout(
        documents=pieces[:, 0].copy(),
        starts=pieces[:, 1].astype(np.uint32),
        stops=pieces[:, 2].astype(np.uint32),
        firsts=np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
    )


class LaidOutRows:
    """Rows of a layout, made on access.

    Args:
        layout: The layout.
        tokens: Returns the tokens of a document of the layout, not read yet.
        seq_len: Tokens per row, T.
        padding_id: Token id that fills the rest of a row.
    """

    def __init__(
        self, layout: RowLayout, tokens: Callable[[int], TokenSequence], *, seq_len: int, padding_id: int
    ) -> None:
        self._layout = layout
        self._tokens = tokens
        self._seq_len = seq_len
        self._padding_id = padding_id

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._layout)

    def __getitem__(self, index: int, /) -> PackedRow:
        """Return a row, whose tokens are not read yet."""
        segments = _LaidOutSegments(self._layout, self._tokens, index)
        return PackedRow(segments=segments, seq_len=self._seq_len, padding_id=self._padding_id)


class _LaidOutSegments:
    """Segments of a row, made on first use: a rank goes through the rows of all ranks, and uses its own.

    Args:
        layout: The layout.
        tokens: Returns the tokens of a document of the layout, not read yet.
        row: The row's index.
    """

    __slots__ = ("_layout", "_row", "_segments", "_tokens")

    def __init__(self, layout: RowLayout, tokens: Callable[[int], TokenSequence], row: int) -> None:
        self._layout, self._tokens, self._row = layout, tokens, row
        self._segments: list[Segment] | None = None

    @property
    def lengths(self) -> Sequence[int]:
        pieces = self._pieces()
        return (self._layout.stops[pieces] - self._layout.starts[pieces]).tolist()

    def _pieces(self) -> slice:
        return slice(*self._layout.firsts[self._row : self._row + 2].tolist())

    def __iter__(self) -> Iterator[Segment]:
        if self._segments is None:
            layout, pieces = self._layout, self._pieces()
            columns = (each[pieces].tolist() for each in (layout.documents, layout.starts, layout.stops))
            self._segments = [
                Segment(self._tokens(document), start, stop)
                for document, start, stop in zip(*columns, strict=True)
            ]
        return iter(self._segments)
