"""Who orthogonalises which matrix, and the exchange of shards that it takes.

Every matrix has one owner among the ranks of its mesh. The ranks send their shards of a bucket of equally
shaped matrices to the owners in one all-to-all, and the owners send the results back, each rank its shard, in
another. Replicas (HSDP) hold the same shards: an owner receives from its own replica and answers all of them.
Without sharding, and on one rank, the same calls move nothing.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


class Block(NamedTuple):
    """The part of a matrix that a rank holds."""

    rows: range
    cols: range

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the block."""
        return len(self.rows), len(self.cols)

    @property
    def numel(self) -> int:
        """Elements of the block."""
        return len(self.rows) * len(self.cols)

    def of(self, matrices: Tensor) -> Tensor:
        """Return this part of whole matrices `[n, rows, cols]`."""
        return matrices[:, self.rows.start : self.rows.stop, self.cols.start : self.cols.stop]


def check_placements(p: Tensor) -> None:
    """Refuse a parameter whose shards cannot be exchanged.

    Args:
        p: A matrix.

    Raises:
        NotImplementedError: It is placed otherwise than by Shard and Replicate.
    """
    for placement in p.placements if isinstance(p, DTensor) else ():
        if not isinstance(placement, Shard | _StridedShard | Replicate):
            raise NotImplementedError(
                f"Muon serves the placements of FSDP2, HSDP and tensor parallelism, Shard and Replicate, got "
                f"{placement}"
            )


@dataclass(frozen=True)
class Layout:
    """How matrices of one shape lie on the ranks of a mesh.

    Attributes:
        shape: Rows and columns of the whole matrix.
        mesh: Where it lies, or None for a plain tensor.
        placements: How, one a dimension of the mesh.
    """

    shape: tuple[int, int]
    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, p: Tensor) -> "Layout":
        """Return the layout of a parameter."""
        rows, cols = p.shape
        if isinstance(p, DTensor):
            return cls((rows, cols), p.device_mesh, tuple(p.placements))
        return cls((rows, cols), None, ())

    @property
    def num_ranks(self) -> int:
        """Ranks of the mesh."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks of the mesh, or None without one."""
        # not kept: a reference would outlive destroy_process_group, and the group's threads the interpreter
        if self.mesh is None:
            return None
        return (self.mesh if self.mesh.ndim == 1 else self.mesh._flatten()).get_group()

    @cached_property
    def rank(self) -> int:
        """This process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @cached_property
    def blocks(self) -> list[Block]:
        """What each rank of the group holds."""
        return [self._block(coordinate) for coordinate in self._coordinates]

    @cached_property
    def replica_of(self) -> list[tuple[int, ...]]:
        """The replica that each rank of the group belongs to."""
        dims = [d for d, p in enumerate(self.placements) if isinstance(p, Replicate)]
        return [tuple(coordinate[d] for d in dims) for coordinate in self._coordinates]

    @cached_property
    def strips(self) -> Tensor | None:
        """The place of each rank's block where all are equal strips of rows; None if they are not."""
        height = len(self.blocks[0].rows)
        is_even = height > 0 and self.shape[0] % height == 0
        if not is_even or any(b.shape != (height, self.shape[1]) for b in self.blocks):
            return None
        return torch.tensor([b.rows.start // height for b in self.blocks])

    @cached_property
    def _coordinates(self) -> list[tuple[int, ...]]:
        if self.mesh is None:
            return [()]
        assert self.group is not None
        coordinates = list(itertools.product(*(range(n) for n in self.mesh.shape)))
        by_rank = dict(zip(self.mesh.mesh.flatten().tolist(), coordinates, strict=True))
        return [by_rank[rank] for rank in dist.get_process_group_ranks(self.group)]

    def _block(self, coordinate: tuple[int, ...]) -> Block:
        spans = [range(n) for n in self.shape]
        assert self.mesh is not None or not coordinate
        # tensor parallelism cuts before FSDP2, whose dimension comes first in the mesh: then it is strided
        dims = sorted(range(len(coordinate)), key=lambda d: isinstance(self.placements[d], _StridedShard))
        for d in dims:
            placement = self.placements[d]
            if isinstance(placement, Shard | _StridedShard):
                assert self.mesh is not None
                span = spans[placement.dim]
                size = -(-len(span) // self.mesh.shape[d])
                spans[placement.dim] = span[coordinate[d] * size : (coordinate[d] + 1) * size]
        return Block(*spans)


class Pending:
    """A tensor under way."""

    def __init__(
        self,
        flat: Tensor,
        finish: Callable[[Tensor], Tensor] = lambda x: x,
        work: dist.Work | None = None,
        sent: Tensor | None = None,
    ) -> None:
        """Take what arrives and what to make of it.

        Args:
            flat: Where it arrives.
            finish: Called on it once it is there.
            work: What fills it, or None if it is full.
            sent: Kept alive until then.
        """
        self._flat, self._finish, self._work, self._sent = flat, finish, work, sent

    def wait(self) -> Tensor:
        """Return the tensor; on a GPU its stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        self._sent = None
        return self._finish(self._flat)


class Exchange:
    """The two ways of one bucket: shards to owners, results to shards."""

    def __init__(self, layout: Layout, num_owned: Sequence[int]) -> None:
        """Describe a bucket.

        Args:
            layout: Of its matrices.
            num_owned: How many of them each rank of the group owns; the matrices are ordered by owner.
        """
        self.layout = layout
        self.num_owned = list(num_owned)
        self._is_partner = [replica == layout.replica_of[layout.rank] for replica in layout.replica_of]

    def to_owners(self, shards: Tensor) -> Pending:
        """Start to send this rank's shards.

        Args:
            shards: Of every matrix, `[matrices, *block]`, ordered by owner.

        Returns:
            The whole matrices that this rank owns, `[owned, rows, cols]`, once awaited.
        """
        layout = self.layout
        if layout.num_ranks == 1:
            return Pending(shards)
        own = layout.blocks[layout.rank]
        if all(self._is_partner):
            send = shards.flatten()
        else:
            pieces = zip(shards.split(self.num_owned), self._is_partner, strict=True)
            send = torch.cat([piece.flatten() for piece, is_partner in pieces if is_partner])
        sent = [n * own.numel * x for n, x in zip(self.num_owned, self._is_partner, strict=True)]
        num_mine = self.num_owned[layout.rank]
        received = [num_mine * b.numel * x for b, x in zip(layout.blocks, self._is_partner, strict=True)]
        return self._start(send, sent, received, self._assemble)

    def to_shards(self, matrices: Tensor) -> Pending:
        """Start to send whole results back.

        Args:
            matrices: Those that this rank owns, `[owned, rows, cols]`.

        Returns:
            This rank's shards of every matrix, `[matrices, *block]` ordered by owner, once awaited.
        """
        layout = self.layout
        if layout.num_ranks == 1:
            return Pending(matrices)
        if layout.strips is None:
            send = torch.cat([block.of(matrices).flatten() for block in layout.blocks])
        else:
            height = len(layout.blocks[0].rows)
            strips = matrices.view(len(matrices), layout.shape[0] // height, height, layout.shape[1])
            send = _in_order(strips.transpose(0, 1), layout.strips).flatten()
        own = layout.blocks[layout.rank]
        sent = [len(matrices) * block.numel for block in layout.blocks]
        received = [n * own.numel for n in self.num_owned]
        return self._start(send, sent, received, lambda flat: flat.view(sum(self.num_owned), *own.shape))

    def _assemble(self, flat: Tensor) -> Tensor:
        """Join the blocks of the owned matrices, which came rank by rank."""
        layout = self.layout
        num_mine = self.num_owned[layout.rank]
        partners = [i for i, is_partner in enumerate(self._is_partner) if is_partner]
        if layout.strips is not None:
            strips = flat.view(len(partners), num_mine, *layout.blocks[0].shape)
            strips = _in_order(strips, layout.strips[partners].argsort())
            return strips.transpose(0, 1).reshape(num_mine, *layout.shape)
        matrices = flat.new_empty(num_mine, *layout.shape)
        blocks = [layout.blocks[i] for i in partners]
        for block, part in zip(blocks, flat.split([num_mine * b.numel for b in blocks]), strict=True):
            block.of(matrices).copy_(part.view(num_mine, *block.shape))
        return matrices

    def _start(
        self, send: Tensor, sent: list[int], received: list[int], finish: Callable[[Tensor], Tensor]
    ) -> Pending:
        flat = send.new_empty(sum(received))
        work = dist.all_to_all_single(flat, send, received, sent, group=self.layout.group, async_op=True)
        return Pending(flat, finish, work, send)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Return x[order], x itself if that changes nothing; `order` lies on the host."""
    if torch.equal(order, torch.arange(len(x))):
        return x
    return x.index_select(0, order.to(x.device))
