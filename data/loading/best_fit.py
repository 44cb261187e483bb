"""Best-fit packing: whole documents packed into rows of T + 1 tokens with at most 1% padding.

Documents are taken in blocks of at least 512 rows' worth of tokens. A document longer than a row is split
into spans of T + 1 tokens; consecutive spans share one token, so that each token but the first is a label
exactly once, as without splits. The spans of a block are placed in decreasing order of length, each into the
row with the least free space that fits it (best-fit decreasing). If that leaves more than 1% of the block
free, because too few documents are short enough to fill the gaps, the emptiest rows are dissolved: their
spans are split to fit the largest gaps of the other rows. What stays free is padding.

Rows are then shuffled by a fixed permutation, since they were filled in order of length, and the spans of a
row are in the order of their documents.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from data.loading.packing import (
    Document,
    PackedRow,
    PackerState,
    Segment,
    SegmentTuple,
    check_seq_len,
)
from data.permutation import Permutation
from errors import UserError

BLOCK_ROWS = 512
MAX_PADDING = 0.01


class Span(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of the document at an index of the block."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing.

    Args:
        lengths: Length of each item, from 1 to `capacity`.
        capacity: Length of a bin.

    Returns:
        The indices of each bin's items. Items of equal length stay in order, so that the result depends on
        the lengths alone.
    """
    bins: list[list[int]] = []
    # bins by free space, and a bit mask of the free spaces that occur
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            which = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, which = capacity, len(bins)
            bins.append([])
        bins[which].append(item)
        with_space[space - length].append(which)
        spaces |= 1 << (space - length)
    return bins


def dissolve_emptiest(bins: Sequence[Sequence[Span]], capacity: int, max_padding: float) -> list[list[Span]]:
    """Dissolve the emptiest bins into the gaps of the others until little padding remains.

    Args:
        bins: Spans of each bin, of at most `capacity` tokens in all.
        capacity: Length of a bin.
        max_padding: Fraction of free space at which to stop; it stays above where no bin fits into the gaps.

    Returns:
        The remaining bins. A span that was split shares a token with the next one of its document.
    """
    filled = [list(each) for each in bins]
    # negative, since heapq is a min-heap
    spaces = [(sum(span.length for span in each) - capacity, which) for which, each in enumerate(bins)]
    heapq.heapify(spaces)
    padding = -sum(space for space, _ in spaces)
    while padding > max_padding * capacity * len(spaces):
        space, emptiest = heapq.heappop(spaces)
        # a split costs the token that both parts share
        needed, targets = capacity + space, list[tuple[int, int]]()
        while needed > 0 and spaces and spaces[0][0] < -1:
            targets.append(heapq.heappop(spaces))
            needed += targets[-1][0] + 1
        if needed > 0:
            break
        padding += space
        for span in filled[emptiest]:
            padding -= _split_into(span, targets, filled)
        filled[emptiest] = []
        for target in targets:
            heapq.heappush(spaces, target)
    return [each for each in filled if each]


def _split_into(span: Span, targets: list[tuple[int, int]], bins: list[list[Span]]) -> int:
    """Split a span over the gaps of (negative free space, bin) pairs; return the number of tokens placed."""
    start = num_placed = 0
    for index, (negative, which) in enumerate(targets):
        length = min(span.length - start, -negative)
        # a part that shares its first token with the previous part needs two tokens of space
        if length < min(2, span.length):
            continue
        bins[which].append(Span(span.document, span.start + start, span.start + start + length))
        targets[index] = negative + length, which
        num_placed += length
        if start + length == span.length:
            return num_placed
        start += length - 1
    raise AssertionError("the gaps are too small for the span")


def pack_block(lengths: Sequence[int], seq_len: int) -> list[list[Span]]:
    """Pack the documents of a block into rows.

    Args:
        lengths: Length of each document in tokens.
        seq_len: Tokens per row, T.

    Returns:
        The spans of each row, of at most T + 1 tokens, in the order of their documents; the rows are shuffled
        by a fixed permutation.
    """
    capacity = seq_len + 1
    spans = list(chain.from_iterable(_spans(*each, seq_len) for each in enumerate(lengths)))
    bins = best_fit_decreasing([span.length for span in spans], capacity)
    rows = dissolve_emptiest([[spans[item] for item in each] for each in bins], capacity, MAX_PADDING)
    order = Permutation(len(rows), "rows of a block")(np.arange(len(rows)))
    return [sorted(rows[which]) for which in order.tolist()]


def _spans(document: int, length: int, seq_len: int) -> Iterator[Span]:
    """Split a document into spans of T + 1 tokens, each of which shares its first token with the last one."""
    start = 0
    while length - start > seq_len + 1:
        yield Span(document, start, start + seq_len + 1)
        start += seq_len
    yield Span(document, start, length)


class BestFitPacker:
    """Pack documents into rows, block by block; a state's offset counts rows of its block.

    Args:
        seq_len: Tokens per row, T.
        padding_id: Token id that fills the free space of rows.

    Raises:
        UserError: `seq_len` is below 1.
    """

    def __init__(self, seq_len: int, padding_id: int) -> None:
        check_seq_len(seq_len)
        self._seq_len = seq_len
        self._padding_id = padding_id

    @property
    def fingerprint(self) -> str:
        """Name of the packing with T, on which the blocks depend."""
        return f"best_fit into rows of {self._seq_len}"

    def pack(
        self, documents: Iterable[Document], state: PackerState
    ) -> Iterator[tuple[PackedRow, PackerState | None]]:
        """Yield each row with the state of the next one, as `data.loading.packing.Packer.pack` does.

        Raises:
            UserError: The documents are not those that the state was saved with.
        """
        position, first, skipped = state
        for block in self._blocks(documents):
            rows = self._rows(block)
            if first >= len(rows):
                raise UserError(
                    f"the saved data position is row {first} of the block at {position}, but the block "
                    f"has {len(rows)} rows: the files or the tokenizer changed since the checkpoint"
                )
            next_block = PackerState(block[-1].next_position, 0, block[-1].skipped)
            for index in range(first, len(rows)):
                is_last = index + 1 == len(rows)
                yield rows[index], next_block if is_last else PackerState(position, index + 1, skipped)
            position, first, skipped = next_block

    def _blocks(self, documents: Iterable[Document]) -> Iterator[list[Document]]:
        block: list[Document] = []
        num_tokens = 0
        for document in documents:
            block.append(document)
            num_tokens += len(document.tokens)
            if num_tokens >= BLOCK_ROWS * self._seq_len:
                yield block
                block, num_tokens = [], 0
        if block:
            yield block

    def _rows(self, block: Sequence[Document]) -> list[PackedRow]:
        return [
            PackedRow(
                segments=SegmentTuple(
                    Segment(block[document].tokens, start, stop) for document, start, stop in spans
                ),
                seq_len=self._seq_len,
                padding_id=self._padding_id,
            )
            for spans in pack_block([len(document.tokens) for document in block], self._seq_len)
        ]
