"""All-to-all exchange between the shards of matrices and the ranks that update them.

Every matrix has one owner among the ranks of its mesh. For a bucket of equally shaped matrices, one
all-to-all gathers whole matrices on their owners, and another scatters the results back to the shards. HSDP
replicas hold equal shards: an owner gathers from its own replica and scatters to all of them. Without
sharding, or on one rank, nothing is communicated.
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

from errors import UnsupportedError


class ShardSlice(NamedTuple):
    """The rows and columns of a matrix that a rank holds."""

    rows: range
    cols: range

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return len(self.rows), len(self.cols)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return len(self.rows) * len(self.cols)

    def of(self, matrices: Tensor) -> Tensor:
        """Return a view of the shards `[n, *shape]` of whole matrices `[n, rows, cols]`."""
        return matrices[:, self.rows.start : self.rows.stop, self.cols.start : self.cols.stop]


def check_placements(p: Tensor) -> None:
    """Check that the shards of a parameter can be exchanged.

    Args:
        p: A matrix.

    Raises:
        UnsupportedError: It has a placement other than Shard and Replicate.
    """
    for placement in p.placements if isinstance(p, DTensor) else ():
        if not isinstance(placement, Shard | _StridedShard | Replicate):
            raise UnsupportedError(
                "optimizers of matrices support the placements of FSDP2, HSDP and tensor parallelism, "
                f"Shard and Replicate, got {placement}"
            )


@dataclass(frozen=True)
class Layout:
    """Shape, mesh and placements of a matrix.

    Attributes:
        shape: Rows and columns of the whole matrix.
        mesh: Its device mesh, or None for a plain tensor.
        placements: One per dimension of the mesh.
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
        """Number of ranks of the mesh."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Process group of all ranks of the mesh, or None without a mesh."""
        # not cached: a reference would keep the group and its threads alive after destroy_process_group
        if self.mesh is None:
            return None
        return (self.mesh if self.mesh.ndim == 1 else self.mesh._flatten()).get_group()

    @cached_property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @cached_property
    def slices(self) -> list[ShardSlice]:
        """The slice that each rank of the group holds."""
        return [self._slice(coordinate) for coordinate in self._coordinates]

    @cached_property
    def replica_of(self) -> list[tuple[int, ...]]:
        """The replica of each rank of the group, as coordinates on the replicated mesh dimensions."""
        dims = [d for d, p in enumerate(self.placements) if isinstance(p, Replicate)]
        return [tuple(coordinate[d] for d in dims) for coordinate in self._coordinates]

    @cached_property
    def row_chunks(self) -> Tensor | None:
        """Index of each rank's chunk of rows, `[ranks]` int64 on the CPU; None if chunks differ in size."""
        height = len(self.slices[0].rows)
        is_even = height > 0 and self.shape[0] % height == 0
        if not is_even or any(s.shape != (height, self.shape[1]) for s in self.slices):
            return None
        return torch.tensor([s.rows.start // height for s in self.slices])

    @cached_property
    def _coordinates(self) -> list[tuple[int, ...]]:
        if self.mesh is None:
            return [()]
        assert self.group is not None
        coordinates = list(itertools.product(*(range(n) for n in self.mesh.shape)))
        by_rank = dict(zip(self.mesh.mesh.flatten().tolist(), coordinates, strict=True))
        return [by_rank[rank] for rank in dist.get_process_group_ranks(self.group)]

    def _slice(self, coordinate: tuple[int, ...]) -> ShardSlice:
        spans = [range(n) for n in self.shape]
        assert self.mesh is not None or not coordinate
        # tensor parallelism shards before FSDP2, although FSDP2's mesh dimension comes first: a strided shard
        dims = sorted(range(len(coordinate)), key=lambda d: isinstance(self.placements[d], _StridedShard))
        for d in dims:
            placement = self.placements[d]
            if isinstance(placement, Shard | _StridedShard):
                assert self.mesh is not None
                span = spans[placement.dim]
                size = -(-len(span) // self.mesh.shape[d])
                spans[placement.dim] = span[coordinate[d] * size : (coordinate[d] + 1) * size]
        return ShardSlice(*spans)


class AsyncResult:
    """The result of an asynchronous all-to-all.

    Args:
        received: The receive buffer.
        unpack: Makes the result of the filled buffer.
        work: Handle of the collective, or None if the buffer is already filled.
        sent: The send buffer, kept alive until the collective has ended.
    """

    def __init__(
        self,
        received: Tensor,
        unpack: Callable[[Tensor], Tensor] = lambda x: x,
        work: dist.Work | None = None,
        sent: Tensor | None = None,
    ) -> None:
        self._received, self._unpack, self._work, self._sent = received, unpack, work, sent

    def wait(self) -> Tensor:
        """Return the result; on a GPU the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        self._sent = None
        return self._unpack(self._received)


class Exchange:
    """The two all-to-alls of a bucket: shards to owners, and results back to shards.

    Args:
        layout: The layout of the bucket's matrices.
        num_owned: Number of matrices that each rank of the group owns; the matrices are ordered by owner.
    """

    def __init__(self, layout: Layout, num_owned: Sequence[int]) -> None:
        self.layout = layout
        self.num_owned = list(num_owned)
        self._in_replica = [replica == layout.replica_of[layout.rank] for replica in layout.replica_of]

    def to_owners(self, shards: Tensor) -> AsyncResult:
        """Start the all-to-all of shards to the owners.

        Args:
            shards: This rank's shards of all matrices, `[matrices, *slice]`, ordered by owner.

        Returns:
            The whole matrices that this rank owns, `[owned, rows, cols]`.
        """
        layout = self.layout
        if layout.num_ranks == 1:
            return AsyncResult(shards)
        own = layout.slices[layout.rank]
        if all(self._in_replica):
            send = shards.flatten()
        else:
            pieces = zip(shards.split(self.num_owned), self._in_replica, strict=True)
            send = torch.cat([piece.flatten() for piece, in_replica in pieces if in_replica])
        send_sizes = [n * own.numel * x for n, x in zip(self.num_owned, self._in_replica, strict=True)]
        num_mine = self.num_owned[layout.rank]
        receive_sizes = [num_mine * s.numel * x for s, x in zip(layout.slices, self._in_replica, strict=True)]
        return self._all_to_all(send, send_sizes, receive_sizes, self._assemble)

    def to_shards(self, matrices: Tensor) -> AsyncResult:
        """Start the all-to-all of results back to the shards.

        Args:
            matrices: The results for the matrices that this rank owns, `[owned, rows, cols]`.

        Returns:
            This rank's shards of all matrices, `[matrices, *slice]`, ordered by owner.
        """
        layout = self.layout
        if layout.num_ranks == 1:
            return AsyncResult(matrices)
        if layout.row_chunks is None:
            send = torch.cat([s.of(matrices).flatten() for s in layout.slices])
        else:
            height = len(layout.slices[0].rows)
            chunks = matrices.view(len(matrices), layout.shape[0] // height, height, layout.shape[1])
            send = _permuted(chunks.transpose(0, 1), layout.row_chunks).flatten()
        own = layout.slices[layout.rank]
        send_sizes = [len(matrices) * s.numel for s in layout.slices]
        receive_sizes = [n * own.numel for n in self.num_owned]
        return self._all_to_all(
            send, send_sizes, receive_sizes, lambda flat: flat.view(sum(self.num_owned), *own.shape)
        )

    def _assemble(self, flat: Tensor) -> Tensor:
        """Return the owned matrices `[owned, rows, cols]` from their shards, which are ordered by rank."""
        layout = self.layout
        num_mine = self.num_owned[layout.rank]
        senders = [i for i, in_replica in enumerate(self._in_replica) if in_replica]
        if layout.row_chunks is not None:
            chunks = flat.view(len(senders), num_mine, *layout.slices[0].shape)
            chunks = _permuted(chunks, layout.row_chunks[senders].argsort())
            return chunks.transpose(0, 1).reshape(num_mine, *layout.shape)
        matrices = flat.new_empty(num_mine, *layout.shape)
        slices = [layout.slices[i] for i in senders]
        for s, part in zip(slices, flat.split([num_mine * s.numel for s in slices]), strict=True):
            s.of(matrices).copy_(part.view(num_mine, *s.shape))
        return matrices

    def _all_to_all(
        self,
        send: Tensor,
        send_sizes: list[int],
        receive_sizes: list[int],
        unpack: Callable[[Tensor], Tensor],
    ) -> AsyncResult:
        received = send.new_empty(sum(receive_sizes))
        work = dist.all_to_all_single(
            received, send, receive_sizes, send_sizes, group=self.layout.group, async_op=True
        )
        return AsyncResult(received, unpack, work, send)


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    """Return x[order] for an order on the CPU, or x itself if the order is the identity."""
    if torch.equal(order, torch.arange(len(x))):
        return x
    return x.index_select(0, order.to(x.device))
