"""Buckets of equally shaped matrices: which rank orthogonalizes which matrix, and in which batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optimizers.exchange import Exchange, Layout


@dataclass(frozen=True)
class Bucket:
    """Matrices of one param group and layout that are exchanged and orthogonalized as one batch.

    Attributes:
        group: Index of their param group.
        params: The matrices, ordered by owner rank.
        exchange: All-to-alls between the shards and the owners.
    """

    group: int
    params: list[Tensor]
    exchange: Exchange

    @property
    def layout(self) -> Layout:
        """The layout of the matrices."""
        return self.exchange.layout


def plan_buckets(groups: Sequence[dict[str, Any]], max_elements: int) -> list[Bucket]:
    """Assign every matrix that has a gradient to an owner rank and a bucket.

    Greedy load balancing: the most expensive matrices first, each to the rank with the least work so far. All
    ranks compute the same plan.

    Args:
        groups: Param groups.
        max_elements: Maximum number of elements that a rank owns in a bucket; a larger matrix has a bucket of
            its own.

    Returns:
        Buckets, the most expensive matrices first.
    """
    by_layout: dict[tuple[int, Layout, Any], list[Tensor]] = {}
    for i, group in enumerate(groups):
        for p in group["params"]:
            if p.grad is not None:
                by_layout.setdefault((i, Layout.of(p), p.dtype), []).append(p)
    buckets: list[Bucket] = []
    loads: dict[Any, list[float]] = {}
    for (i, layout, _), params in sorted(by_layout.items(), key=lambda item: -_cost(item[0][1].shape)):
        load = loads.setdefault(layout.mesh, [0.0] * layout.num_ranks)
        by_owner: list[list[Tensor]] = [[] for _ in load]
        for p in params:
            owner = load.index(min(load))
            load[owner] += _cost(layout.shape)
            by_owner[owner].append(p)
        size = max(1, max_elements // (layout.shape[0] * layout.shape[1]))
        for start in range(0, max(map(len, by_owner)), size):
            chunks = [owned[start : start + size] for owned in by_owner]
            exchange = Exchange(layout, [len(chunk) for chunk in chunks])
            buckets.append(Bucket(i, [p for chunk in chunks for p in chunk], exchange))
    return buckets


def _cost(shape: tuple[int, int]) -> float:
    """Return the time of one orthogonalization, up to a constant factor."""
    short, long = sorted(shape)
    return short * short * (6.0 * long + 14.0 * short)
