"""Whole documents laid into rows of T + 1 tokens, so that few are cut and at most 1% is padding.

Documents are taken in blocks of at least 512 rows' worth of tokens. A document longer than a row is cut into
pieces of T + 1 tokens, neighbours sharing one, so that each of its tokens but the first is a label exactly
once, as without cuts. The pieces of a block go, longest first, into the row with the least space that holds
them (best fit decreasing). Where that leaves more than 1% of the block empty, because too few documents are
short enough to fill what long ones leave, the emptiest rows are dissolved and their pieces cut to fit into
the largest spaces of the others. What stays empty is padding.

Rows then follow in a fixed random order, since they were filled in the order of length, and the pieces of a
row in the order of their documents.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from data.loading.packing import Document, Mark, PackedRow, Piece
from data.permutation import Permutation

BLOCK_ROWS = 512
MAX_PADDING = 0.01


class Span(NamedTuple):
    """Consecutive tokens of a document of a block: those from `first` until before `last`."""

    document: int
    first: int
    last: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.last - self.first


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Lay items into as few bins as best fit decreasing finds.

    Args:
        lengths: Length of each item, from 1 to `capacity`.
        capacity: Length of a bin.

    Returns:
        The indices of each bin's items. Equal lengths stay in order, so that the result depends on the
        lengths alone.
    """
    bins: list[list[int]] = []
    # Bins by the space that is left in them, and a bit for each space that some bin has.
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


def fill_spaces(bins: Sequence[Sequence[Span]], capacity: int, max_padding: float) -> list[list[Span]]:
    """Dissolve the emptiest bins until at most a share of all space is empty, or nothing more can be done.

    Args:
        bins: Spans that fit into a bin each.
        capacity: Length of a bin.
        max_padding: The share.

    Returns:
        The bins that are left. A span that was cut shares a token with the next one of its document.
    """
    filled = [list(each) for each in bins]
    spaces = [(sum(span.length for span in each) - capacity, which) for which, each in enumerate(bins)]
    heapq.heapify(spaces)
    padding = -sum(space for space, _ in spaces)
    while padding > max_padding * capacity * len(spaces):
        space, emptiest = heapq.heappop(spaces)
        # A cut costs the token that both parts have.
        needed, targets = capacity + space, list[tuple[int, int]]()
        while needed > 0 and spaces and spaces[0][0] < -1:
            targets.append(heapq.heappop(spaces))
            needed += targets[-1][0] + 1
        if needed > 0:
            break
        padding += space
        for span in filled[emptiest]:
            padding -= _pour(span, targets, filled)
        filled[emptiest] = []
        for target in targets:
            heapq.heappush(spaces, target)
    return [each for each in filled if each]


def _pour(span: Span, targets: list[tuple[int, int]], bins: list[list[Span]]) -> int:
    """Lay a span into the first bins of a list of (negative space, bin) that have some; count its tokens."""
    first = poured = 0
    for index, (negative, which) in enumerate(targets):
        length = min(span.length - first, -negative)
        # One token of space is none for a part that shares one with the part before.
        if length < min(2, span.length):
            continue
        bins[which].append(Span(span.document, span.first + first, span.first + first + length))
        targets[index] = negative + length, which
        poured += length
        if first + length == span.length:
            return poured
        first += length - 1
    raise AssertionError("the bins have no room for the span")


class BestFitPacker:
    """Lays documents into rows, block by block; a mark's offset counts rows of its block."""

    def __init__(self, seq_len: int, padding: int) -> None:
        """Describe the rows.

        Args:
            seq_len: Tokens a row, T.
            padding: Token id that fills up rows.

        Raises:
            ValueError: If `seq_len` is below 1.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, must be at least 1: set training.seq_len")
        self._seq_len = seq_len
        self._padding = padding

    @property
    def name(self) -> str:
        """What a saved position is good for: blocks depend on the length of rows."""
        return f"best_fit into rows of {self._seq_len}"

    def pack(self, documents: Iterable[Document], start: Mark) -> Iterator[tuple[PackedRow, Mark | None]]:
        """Make rows, as `data.loading.packing.Packer` says."""
        leave_out = start.offset
        position, skipped = start.position, start.skipped
        for block in self._blocks(documents):
            rows = self._rows(block)
            if leave_out >= len(rows):
                raise ValueError(
                    f"the saved data position is row {leave_out} of the block at {position}, but the block "
                    f"has {len(rows)} rows: the files or the tokenizer changed since the checkpoint"
                )
            after = Mark(block[-1].after, 0, block[-1].skipped)
            for index in range(leave_out, len(rows)):
                is_last = index + 1 == len(rows)
                yield rows[index], after if is_last else Mark(position, index + 1, skipped)
            position, leave_out, skipped = after.position, 0, after.skipped

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
        capacity = self._seq_len + 1
        lengths = [len(document.tokens) for document in block]
        spans = list(chain.from_iterable(map(self._spans, range(len(block)), lengths)))
        bins = best_fit_decreasing([span.length for span in spans], capacity)
        rows = fill_spaces([[spans[item] for item in each] for each in bins], capacity, MAX_PADDING)
        order = Permutation(len(rows), "rows of a block")(np.arange(len(rows)))
        return [
            PackedRow(
                pieces=tuple(
                    Piece(block[document].tokens, first, last)
                    for document, first, last in sorted(rows[which])
                ),
                seq_len=self._seq_len,
                padding=self._padding,
            )
            for which in order.tolist()
        ]

    def _spans(self, document: int, length: int) -> Iterator[Span]:
        first = 0
        while length - first > self._seq_len + 1:
            yield Span(document, first, first + self._seq_len + 1)
            first += self._seq_len
        yield Span(document, first, length)
