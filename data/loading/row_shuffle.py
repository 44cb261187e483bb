"""Rows shuffled in windows: the stage between packing and batches, exact to resume at any row.

The rows of a source are divided into windows of consecutive rows, and each window's rows are served in the
order of a permutation that depends on the seed and the window's number. A state names the start of its window
and the number of rows served; on resume the window is made again, and nothing else is kept. (A buffer from
which each next row is drawn at random mixes no better, and its content at a step depends on all rows before.)

A window is held in one of two ways. Of prepared shards, the layout of the rows is held, and tokens are read
when a row is served: a window is 65,536 rows or more, and ends at or before the end of the epoch. Of text and
of mixtures, the rows themselves are held: a window is `window_rows` rows, across epochs.

While a window is served, the next one is made at the same pace, so that no step waits for a whole window but
the first after a start or a resume. A row that was served is dropped: about as many rows as a window has are
held at any time.
"""

import bisect
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import numpy as np

from data.loading.packing import PackedRow, PackerState, RowBlock, Rows
from data.loading.stream import StreamState
from data.permutation import Permutation
from errors import UserError

# windows of rows of which only the layout is held
LAYOUT_WINDOW_ROWS = 1 << 16

# the number of rows left in an epoch is an estimate, and the last window must not be too small
_MARGIN = 1.25


class RowSource(Protocol):
    """Rows in order, without end."""

    def blocks(self, start: PackerState) -> Iterator[RowBlock]:
        """Yield blocks of rows from a state on, the start of a block.

        Args:
            start: State of the first row.

        Raises:
            UserError: The source cannot be read, or changed since the state was saved.
        """
        ...


class RowShuffle:
    """Rows of T + 1 tokens, shuffled in windows, each with the state after it.

    Args:
        source: The rows in order.
        packing: Name of the packing of these rows.
        seed: Seed of the shuffle.
        window_rows: Rows of a window. The last window of an epoch has more, so that none has fewer, where the
            source tells how many rows are left.
    """

    def __init__(self, source: RowSource, *, packing: str, seed: int, window_rows: int) -> None:
        assert window_rows >= 1
        self._source = source
        self._packing = packing
        self._seed = seed
        self._window_rows = window_rows

    @property
    def fingerprint(self) -> str:
        """Name of packing and shuffle; a saved state is valid for rows of the same one."""
        return f"{self._packing}, shuffled rows"

    def rows(self, start: StreamState) -> Iterator[tuple[PackedRow, StreamState]]:
        """Yield each row from a state on, with the state of the next row.

        Args:
            start: State of the first row.

        Raises:
            UserError: The source cannot be read, or changed since the state was saved.
        """
        blocks = self._source.blocks(start.packer_state)
        # a window that was saved keeps its size, also where the new run's windows have another
        window = self._window(start.packer_state, num_rows=start.window_rows)
        window.fill(blocks)
        if start.window_rows:
            _check_saved(window, start)
        first, state = start.served, start
        while True:
            following = self._window(window.next, expected_rows=window.rows_left)
            order = Permutation(len(window), self._seed, "rows", state.window)
            items = order(np.arange(len(window))).tolist()
            for item in items[:first]:
                window.take(item)
            for served, item in enumerate(items[first:], first + 1):
                following.fill(blocks, (served - first) / (len(window) - first))
                state = self._after(window, state, served)
                yield window.take(item), state
            window, first = following, 0

    def _window(self, start: PackerState, *, num_rows: int = 0, expected_rows: float = 0) -> "_Window":
        return _Window(start, self._window_rows, num_rows=num_rows, expected_rows=expected_rows)

    def _after(self, window: "_Window", state: StreamState, served: int) -> StreamState:
        """Return the state after so many rows of a window."""
        sequence = state.sequence + 1
        if served == len(window):
            return StreamState(sequence=sequence, window=state.window + 1, **window.next._asdict())
        return StreamState(
            sequence=sequence,
            window=state.window,
            window_rows=len(window),
            served=served,
            window_skipped=window.skipped,
            **window.start._asdict(),
        )


class _Window:
    """Consecutive rows, filled block by block.

    Args:
        start: State of the first row.
        min_rows: Rows of a window, unless the epoch ends before.
        num_rows: Rows of this window, if it was filled before a resume; else 0.
        expected_rows: Estimate of the rows left in the epoch, by which the window is filled at an even pace.
    """

    def __init__(self, start: PackerState, min_rows: int, *, num_rows: int, expected_rows: float) -> None:
        self.start = self.next = start
        self.rows_left = 0.0
        self._min_rows = min_rows
        self._num_rows = num_rows
        is_last = expected_rows < (1 + _MARGIN) * min_rows
        self._expected_rows = expected_rows if is_last else min_rows
        self._is_full = False
        self._blocks: list[Rows | None] = []
        self._ends: list[int] = []
        self._remaining: list[int] = []

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @cached_property
    def skipped(self) -> dict[str, int]:
        """Source rows skipped in the full window, by reason."""
        assert self._is_full
        before = self.start.skipped
        counts = {reason: count - before.get(reason, 0) for reason, count in self.next.skipped.items()}
        return {reason: count for reason, count in counts.items() if count}

    def fill(self, blocks: Iterator[RowBlock], fraction: float = 1.0) -> None:
        """Fill the window to a fraction of its expected size; to 1, until it is full."""
        while not self._is_full and (fraction >= 1 or len(self) < fraction * self._expected_rows):
            self._add(next(blocks))

    def take(self, index: int) -> PackedRow:
        """Return a row for the only time; a block is dropped with its last row."""
        which = bisect.bisect_right(self._ends, index)
        rows = self._blocks[which]
        assert rows is not None
        row = rows[index - self._ends[which] + len(rows)]
        self._remaining[which] -= 1
        if not self._remaining[which]:
            self._blocks[which] = None
        return row

    def _add(self, block: RowBlock) -> None:
        self._blocks.append(block.rows)
        self._ends.append(len(self) + len(block.rows))
        self._remaining.append(len(block.rows))
        self.next, self.rows_left = block.next, block.rows_left
        if self._num_rows:
            self._is_full = len(self) >= self._num_rows
        else:
            is_large = len(self) >= self._min_rows and block.rows_left >= _MARGIN * self._min_rows
            self._is_full = is_large or block.ends_epoch


def _check_saved(window: _Window, start: StreamState) -> None:
    """Raise unless a window that was made again has the rows of the one that was saved.

    Rows that are skipped, a damaged document of shards for example, shift all that follow them: tokens of the
    window would be served twice, and others never.
    """
    num_rows, skipped = len(window), dict(start.window_skipped)
    if (num_rows, window.skipped) == (start.window_rows, skipped):
        return
    was, now = (
        ("", "")
        if window.skipped == skipped
        else (f" (skipped: {_describe(skipped)})", f" (skipped: {_describe(window.skipped)})")
    )
    raise UserError(
        f"the saved data position is in a window of {start.window_rows} rows{was}, but the window has "
        f"{num_rows}{now}: the data or the code that reads it changed since the checkpoint; restore files "
        "(shards with `python -m data.shards prepare`) and on_damaged_file, or start the data from its "
        "beginning in a branch: another run.folder, checkpoint.start_from, checkpoint.restart_data = true"
    )


def _describe(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "none"
