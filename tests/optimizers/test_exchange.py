import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from errors import UnsupportedError
from optimizers.buckets import plan_buckets
from optimizers.exchange import Exchange, Layout, check_placements
from tests.ranks import run_ranks

# mesh, placements, shape: FSDP2 with equal and unequal chunks of rows and with fewer rows than ranks, tensor
# parallelism by columns, no sharding, HSDP, and FSDP2 with tensor parallelism
CASES: list[tuple[tuple[int, ...], list[Placement], tuple[int, int]]] = [
    ((4,), [Shard(0)], (8, 6)),
    ((4,), [Shard(0)], (7, 3)),
    ((4,), [Shard(0)], (2, 5)),
    ((4,), [Shard(1)], (5, 6)),
    ((4,), [Replicate()], (3, 4)),
    ((2, 2), [Replicate(), Shard(0)], (8, 4)),
    ((2, 2), [Replicate(), Shard(0)], (5, 4)),
    ((2, 2), [Shard(0), Shard(1)], (6, 7)),
    ((2, 2), [Shard(0), Replicate()], (6, 4)),
]


def round_trip(layout: Layout, local: torch.Tensor, whole: torch.Tensor, num_owned: list[int]) -> None:
    """Exchange several matrices, multiples of one another, with their owners and back."""
    exchange = Exchange(layout, num_owned)
    factors = torch.arange(1.0, sum(num_owned) + 1.0)[:, None, None]
    owned = exchange.to_owners(factors * local).wait()
    start = sum(num_owned[: layout.rank])
    own_factors = factors[start : start + num_owned[layout.rank]]
    assert torch.equal(owned, own_factors * whole)
    assert torch.equal(exchange.to_shards(owned + 1.0).wait(), factors * local + 1.0)


def check_strided_shards(num_fsdp: int, num_tp: int, num_owned: list[int]) -> None:
    """FSDP2 over tensor parallelism by rows: the second mesh dimension shards first."""
    mesh = init_device_mesh("cpu", (num_fsdp, num_tp), mesh_dim_names=("fsdp", "tp"))
    whole = torch.arange(72.0).view(12, 6)
    fsdp, tp = mesh.get_local_rank("fsdp"), mesh.get_local_rank("tp")
    local = whole.chunk(num_tp)[tp].chunk(num_fsdp)[fsdp]
    layout = Layout((12, 6), mesh, (_StridedShard(0, split_factor=num_tp), Shard(0)))
    round_trip(layout, local, whole, num_owned)


def check_bucket_plan(mesh: DeviceMesh) -> None:
    params: list[Any] = []
    for i in range(7):
        p = torch.nn.Parameter(distribute_tensor(torch.full((8, 4), float(i)), mesh, [Shard(0)]))
        p.grad = torch.zeros_like(p)
        params.append(p)
    tall = torch.nn.Parameter(distribute_tensor(torch.zeros(32, 16), mesh, [Shard(0)]))
    tall.grad = torch.zeros_like(tall)
    groups = [{"params": [*params, tall]}]
    buckets = plan_buckets(groups, max_elements=32)
    owned = [[0] * 4 for _ in buckets]
    for counts, bucket in zip(owned, buckets, strict=True):
        counts[:] = bucket.exchange.num_owned
    # the large matrix has a rank to itself; the small ones are distributed over the others
    assert owned[0] == [1, 0, 0, 0]
    small = [sum(counts[rank] for counts in owned[1:]) for rank in range(4)]
    assert small == [0, 3, 2, 2]
    assert max(max(counts) for counts in owned) == 1
    planned = [p for bucket in buckets for p in bucket.params]
    assert len(planned) == 8
    assert {id(p) for p in planned} == {id(p) for p in [*params, tall]}


def join(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)


def worker(rank: int, folder: str) -> None:
    join(rank, folder, 4)
    for mesh_shape, placements, shape in CASES:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("a", "b")[: len(mesh_shape)])
        whole = torch.arange(float(shape[0] * shape[1])).view(shape)
        sharded = distribute_tensor(whole, mesh, placements)
        assert isinstance(sharded, DTensor)
        layout = Layout.of(sharded)
        for num_owned in ([1, 1, 1, 1], [0, 3, 1, 0]):
            round_trip(layout, sharded.to_local(), whole, num_owned)
    check_strided_shards(2, 2, [1, 0, 2, 1])
    check_bucket_plan(init_device_mesh("cpu", (4,)))
    dist.destroy_process_group()


def test_round_trip_from_shards_to_owners_and_back(tmp_path: Path) -> None:
    run_ranks(worker, 4, str(tmp_path))


def strided_worker(rank: int, folder: str) -> None:
    join(rank, folder, 6)
    check_strided_shards(2, 3, [1, 0, 2, 1, 0, 1])
    dist.destroy_process_group()


def test_an_order_of_shards_that_is_not_its_own_inverse(tmp_path: Path) -> None:
    run_ranks(strided_worker, 6, str(tmp_path))


def test_other_placements_are_unsupported() -> None:
    class Placed(DTensor):
        placements = (Partial(),)

        def __new__(cls) -> "Placed":
            return torch.Tensor._make_wrapper_subclass(cls, (2, 2))

    with pytest.raises(UnsupportedError, match="Shard and Replicate, got P"):
        check_placements(Placed())
