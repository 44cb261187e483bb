"""Batch arithmetic: how the rows of a global batch are divided among ranks and micro-steps.

A step takes G = global_batch_size consecutive rows. With W data-parallel ranks and b = local_batch_size, it
has A = G / (W * b) micro-steps, the gradient accumulation steps. Micro-step m takes the step's rows from m *
W * b to (m + 1) * W * b, of which rank w takes b: those from m * W * b + w * b, or, where documents are
masked, a choice that gives all ranks about as much attention to compute, since each waits for the slowest.
"""

import heapq
from collections.abc import Sequence

from errors import UserError


def gradient_accumulation_steps(*, global_batch_size: int, local_batch_size: int, num_ranks: int) -> int:
    """Return A, the micro-batches per rank and step.

    Args:
        global_batch_size: Rows per step over all ranks, G.
        local_batch_size: Rows per micro-batch, b.
        num_ranks: Data-parallel ranks, W.

    Raises:
        UserError: A size is below 1, or G is not a multiple of W * b.
    """
    for name, size in (("global_batch_size", global_batch_size), ("local_batch_size", local_batch_size)):
        if size < 1:
            raise UserError(f"training.{name} is {size}, must be at least 1")
    rows = rows_per_micro_step(local_batch_size, num_ranks)
    if global_batch_size % rows:
        of_rank, rest = divmod(global_batch_size, num_ranks)
        fitting = max((b for b in range(1, local_batch_size) if not rest and of_rank % b == 0), default=None)
        smaller = "" if fitting is None else f"; or set training.local_batch_size to {fitting}"
        raise UserError(
            f"training.global_batch_size ({global_batch_size}) must be a multiple of "
            f"training.local_batch_size ({local_batch_size}) * ranks ({num_ranks}) = {rows}: the next one is "
            f"{(global_batch_size // rows + 1) * rows}{smaller}"
        )
    return global_batch_size // rows


def rows_per_micro_step(local_batch_size: int, num_ranks: int) -> int:
    """Return W * b, the rows that all ranks take per micro-step."""
    return local_batch_size * num_ranks


def rank_rows(local_batch_size: int, rank: int, num_ranks: int) -> range:
    """Return the rows of a micro-step that a rank takes, as indices from 0 to W * b.

    Args:
        local_batch_size: Rows per micro-batch, b.
        rank: Index of the data-parallel rank, w.
        num_ranks: Data-parallel ranks, W.
    """
    assert 0 <= rank < num_ranks, f"rank {rank} of {num_ranks}"
    return range(rank * local_batch_size, (rank + 1) * local_batch_size)


def balance_rows(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Divide the rows of a micro-step into equally many per rank, of about the same sums of costs.

    The most expensive rows first, each goes to the rank with the least so far that has room (Graham 1969).

    Args:
        costs: Cost of each row of the micro-step, `[W * b]`.
        num_ranks: Data-parallel ranks, W.

    Returns:
        The rows of each rank, ascending.
    """
    room = len(costs) // num_ranks
    by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        load, rank = heapq.heappop(loads)
        by_rank[rank].append(row)
        if len(by_rank[rank]) < room:
            heapq.heappush(loads, (load + costs[row], rank))
    return [sorted(rows) for rows in by_rank]
