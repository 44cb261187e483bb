"""A step with a non-finite gradient changes nothing, and an update's logged size is how far weights moved."""

import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.distributed.utils import clip_grad_norm_

from optimizers.config import AdamWGroup, MuonGroup, OptimizerConfig
from optimizers.titan import GroupedOptimizers, build_optimizers
from optimizers.update_size import num_replicas

WIDTH = 6
# 5 entries or rows, which 2 ranks share unevenly, and 1, of which one rank has nothing
CONFIG = OptimizerConfig(
    groups={
        "hidden": MuonGroup(parameters=[r"layers\..*weight"], lr=0.02, weight_decay=0.1, dtype="float32"),
        "output": AdamWGroup(parameters=[r"output\.weight"], lr=0.01, weight_decay=0.3),
        "vectors": AdamWGroup(parameters=[r".*bias"], lr=0.003, beta2=0.99, eps=1e-3),
    }
)
ADAMW = OptimizerConfig(
    groups={
        **CONFIG.groups,
        "hidden": AdamWGroup(parameters=[r"layers\..*weight"], lr=0.02, weight_decay=0.1),
    }
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 5), nn.Linear(5, 5), nn.Linear(5, 1)])
        self.output = nn.Linear(1, 3)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.output(x)


def sharded(shape: tuple[int, ...]) -> Model:
    model = Model()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


def backward(model: nn.Module, step: int, poison: float | None = None) -> torch.Tensor:
    """Gradients of a step, on rank 0 with a poisoned one; gives the norm before clipping."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))[rank::num_ranks]
    model.zero_grad()
    loss = model(x).square().sum() / 8
    if poison is not None and rank == 0:
        loss.register_hook(lambda gradient: gradient * poison)
    loss.backward()
    return clip_grad_norm_(model.parameters(), 1.0, foreach=True)


def step(model: nn.Module, optimizers: GroupedOptimizers, index: int, poison: float | None = None) -> None:
    norm = backward(model, index, poison)
    optimizers.step(found_inf=(~norm.isfinite()).float())


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(model: nn.Module, optimizers: GroupedOptimizers) -> dict[str, torch.Tensor]:
    """This rank's part of weights and optimizer state."""
    tensors = {name: local(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{name}.{key}"] = local(value)
    return tensors


def check_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def check_masks(make: Any, config: OptimizerConfig) -> None:
    clean, poisoned = make(), make()
    optimizers, theirs = build_optimizers([clean], config), build_optimizers([poisoned], config)
    for index in range(3):
        step(clean, optimizers, index)
        step(poisoned, theirs, index)
        before = everything(poisoned, theirs)
        assert len(before) > 8 + 2 * 6
        for poison in (math.nan, math.inf, -math.inf):
            step(poisoned, theirs, 7, poison)
            check_equal(everything(poisoned, theirs), before)
    # as if the masked steps had never been
    check_equal(everything(poisoned, theirs), everything(clean, optimizers))
    moved = [name for name, p in whole(make()).items() if not torch.equal(p, whole(clean)[name])]
    assert len(moved) == 8


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in model.named_parameters()
    }


def check_sizes(make: Any, config: OptimizerConfig) -> None:
    """The mean squares, against what the weights moved by."""
    model = make()
    optimizers = build_optimizers([model], config)
    for index in range(4):
        optimizers.record_updates(index > 0)
        before = whole(model)
        step(model, optimizers, index)
        if index == 0:
            continue
        shares = optimizers.update_mean_squares()
        assert list(shares) == ["hidden", "output", "vectors"]
        squares = torch.stack(list(shares.values()))
        assert squares.dtype == torch.float32
        if dist.is_initialized():
            dist.all_reduce(squares)
        after = whole(model)
        for (name, group), square in zip(config.groups.items(), squares, strict=True):
            members = {
                "hidden": [n for n in before if n.startswith("layers") and n.endswith("weight")],
                "output": ["output.weight"],
                "vectors": [n for n in before if n.endswith("bias")],
            }[name]
            moved = [
                (before[n].double() * (1 - group.lr * group.weight_decay) - after[n]) / group.lr
                for n in members
            ]
            expected = torch.cat([m.flatten() for m in moved]).square().mean()
            torch.testing.assert_close(square.double(), expected, rtol=1e-3, atol=0)


def test_on_one_process_without_a_group() -> None:
    assert num_replicas(torch.zeros(3)) == 1
    for config in (CONFIG, ADAMW):
        check_masks(Model, config)
        check_sizes(Model, config)


def test_spectra_are_those_of_the_muon_groups() -> None:
    model = Model()
    optimizers = build_optimizers([model], CONFIG)
    optimizers.record_updates(True)
    step(model, optimizers, 0)
    spectra = optimizers.update_spectra()
    assert list(spectra) == ["hidden"]
    least, median, most = spectra["hidden"]
    assert 0.0 <= least <= median <= most < 1.3
    assert median > 0.5
    model = Model()
    assert build_optimizers([model], ADAMW).update_spectra() == {}


def worker(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=num_ranks)
    shape = (2,) if num_ranks == 2 else (2, 2)
    assert {num_replicas(p) for p in sharded(shape).parameters()} == {num_ranks // 2}
    assert num_replicas(torch.zeros(3)) == num_ranks
    for config in (CONFIG, ADAMW):
        check_masks(lambda: sharded(shape), config)
        check_sizes(lambda: sharded(shape), config)
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_on_several_ranks(num_ranks: int, tmp_path: Path) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["optimizers.titan"])
    mp.start_processes(worker, args=(num_ranks, str(tmp_path)), nprocs=num_ranks, start_method="forkserver")


@pytest.mark.gpu
def test_neither_the_mask_nor_the_size_waits_for_the_device() -> None:
    model = Model().cuda()
    optimizers = build_optimizers([model], ADAMW)
    for poison in (1.0, math.nan):
        (model(torch.ones(4, WIDTH, device="cuda")).sum() * poison).backward()
        norm = clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        before = everything(model, optimizers)
        if poison != 1.0:  # the first step makes the state
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizers.step(found_inf=(~norm.isfinite()).float())
            optimizers.update_mean_squares()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    check_equal(everything(model, optimizers), before)
