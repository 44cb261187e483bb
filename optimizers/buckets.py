"""Buckets: matrices of one layout that are orthogonalised together, each rank those that it owns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optimizers.exchange import Exchange, Layout


@dataclass(frozen=True)
class Bucket:
    """Matrices of one layout and group.

    Attributes:
        group: Index of their group.
        params: The matrices, ordered by owner.
        exchange: Brings their shards to the owners and the results back.
    """

    group: int
    params: list[Tensor]
    exchange: Exchange

    @property
    def layout(self) -> Layout:
        """The layout of the matrices."""
        return self.exchange.layout

    @property
    def first_own(self) -> int:
        """Index of the first matrix that this rank owns."""
        return sum(self.exchange.num_owned[: self.layout.rank])


def plan(groups: Sequence[dict[str, Any]], max_elements: int) -> list[Bucket]:
    """Assign every matrix that has a gradient to a rank, and cut the matrices into buckets.

    The costliest go first, each to the rank that has the least to do; the plan is the same on every rank.

    Args:
        groups: Param groups.
        max_elements: Most elements of the matrices that a rank owns in a bucket; a larger one goes alone.

    Returns:
        Buckets, the costliest matrices first.
    """
    alike: dict[tuple[int, Layout, Any], list[Tensor]] = {}
    for i, group in enumerate(groups):
        for p in group["params"]:
            if p.grad is not None:
                alike.setdefault((i, Layout.of(p), p.dtype), []).append(p)
    buckets: list[Bucket] = []
    loads: dict[Any, list[float]] = {}
    for (i, layout, _), params in sorted(alike.items(), key=lambda item: -_cost(item[0][1].shape)):
        load = loads.setdefault(layout.mesh, [0.0] * layout.num_ranks)
        by_owner: list[list[Tensor]] = [[] for _ in load]
        for p in params:
            owner = load.index(min(load))
            load[owner] += _cost(layout.shape)
            by_owner[owner].append(p)
        size = max(1, max_elements // (layout.shape[0] * layout.shape[1]))
        for start in range(0, max(map(len, by_owner)), size):
            chunks = [own[start : start + size] for own in by_owner]
            exchange = Exchange(layout, [len(chunk) for chunk in chunks])
            buckets.append(Bucket(i, [p for chunk in chunks for p in chunk], exchange))
    return buckets


def _cost(shape: tuple[int, int]) -> float:
    """Return the time of an orthogonalisation, up to a factor."""
    short, long = sorted(shape)
    return short * short * (6.0 * long + 14.0 * short)
