"""NaN or Inf gradients skip a step, and mean squares of updates are those of the weight changes."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torchtitan.distributed.utils import clip_grad_norm_

from optimizers.adamw import AdamW
from optimizers.config import AdamWGroup, MuonGroup, OptimizerConfig, ParameterGroup
from optimizers.titan import ParamGroupOptimizers, build_optimizers
from optimizers.update_size import num_replicas
from tests.ranks import run_ranks

WIDTH = 6
# 5 elements or rows are sharded unevenly over 2 ranks; of 1, one rank has nothing
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


def sharded_model(shape: tuple[int, ...]) -> Model:
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


def backward(model: nn.Module, step: int, factor: float | None = None) -> torch.Tensor:
    """Compute the gradients of a step, on rank 0 multiplied by a factor; return the norm before clipping."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))[rank::num_ranks]
    model.zero_grad()
    loss = model(x).square().sum() / 8
    if factor is not None and rank == 0:
        loss.register_hook(lambda gradient: gradient * factor)
    loss.backward()
    return clip_grad_norm_(model.parameters(), 1.0, foreach=True)


def step(model: nn.Module, optimizers: ParamGroupOptimizers, index: int, factor: float | None = None) -> None:
    norm = backward(model, index, factor)
    optimizers.step(found_inf=(~norm.isfinite()).float())


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local_state(model: nn.Module, optimizers: ParamGroupOptimizers) -> dict[str, torch.Tensor]:
    """Copy this rank's shards of weights and optimizer state."""
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


def check_skipped_steps(make: Any, config: OptimizerConfig, build: Any = build_optimizers) -> None:
    reference, model = make(), make()
    reference_optimizers, optimizers = (build([m], config) for m in (reference, model))
    for index in range(3):
        step(reference, reference_optimizers, index)
        step(model, optimizers, index)
        before = local_state(model, optimizers)
        assert len(before) == 8 + sum(len(state) for each in optimizers for state in each.state.values())
        for factor in (math.nan, math.inf, -math.inf):
            step(model, optimizers, 7, factor)
            check_equal(local_state(model, optimizers), before)
    # equal to a run without the skipped steps
    check_equal(local_state(model, optimizers), local_state(reference, reference_optimizers))
    initial, final = full_tensors(make()), full_tensors(reference)
    assert len([name for name, p in initial.items() if not torch.equal(p, final[name])]) == 8


def full_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in model.named_parameters()
    }


def check_mean_squares(make: Any, config: OptimizerConfig) -> None:
    """Compare the mean squares with those of the weight changes."""
    model = make()
    optimizers = build_optimizers([model], config)
    for index in range(4):
        optimizers.record_update_stats(index > 0)
        before = full_tensors(model)
        step(model, optimizers, index)
        if index == 0:
            continue
        mean_squares = optimizers.local_update_mean_squares()
        assert list(mean_squares) == ["hidden", "output", "vectors"]
        squares = torch.stack(list(mean_squares.values()))
        assert squares.dtype == torch.float32
        if dist.is_initialized():
            dist.all_reduce(squares)
        after = full_tensors(model)
        for (name, group), square in zip(config.groups.items(), squares, strict=True):
            members = {
                "hidden": [n for n in before if n.startswith("layers") and n.endswith("weight")],
                "output": ["output.weight"],
                "vectors": [n for n in before if n.endswith("bias")],
            }[name]
            updates = [
                (before[n].double() * (1 - group.lr * group.weight_decay) - after[n]) / group.lr
                for n in members
            ]
            expected = torch.cat([u.flatten() for u in updates]).square().mean()
            torch.testing.assert_close(square.double(), expected, rtol=1e-3, atol=0)


def test_one_process_without_process_group() -> None:
    assert num_replicas(torch.zeros(3)) == 1
    for config in (CONFIG, ADAMW):
        check_skipped_steps(Model, config)
        check_mean_squares(Model, config)


def test_singular_values_of_muon_groups() -> None:
    model = Model()
    optimizers = build_optimizers([model], CONFIG)
    optimizers.record_update_stats(True)
    step(model, optimizers, 0)
    singular_values = optimizers.update_singular_values()
    assert list(singular_values) == ["hidden"]
    minimum, median, maximum = singular_values["hidden"]
    assert 0.0 <= minimum <= median <= maximum < 1.3
    assert median > 0.5
    model = Model()
    assert build_optimizers([model], ADAMW).update_singular_values() == {}


def worker(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=num_ranks)
    shape = (2,) if num_ranks == 2 else (2, 2)
    assert {num_replicas(p) for p in sharded_model(shape).parameters()} == {num_ranks // 2}
    assert num_replicas(torch.zeros(3)) == num_ranks
    for config in (CONFIG, ADAMW):
        check_skipped_steps(lambda: sharded_model(shape), config)
        check_mean_squares(lambda: sharded_model(shape), config)
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_several_ranks(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(worker, num_ranks, num_ranks, str(tmp_path))


@pytest.mark.gpu
def test_found_inf_and_mean_squares_do_not_synchronize_with_the_device() -> None:
    model = Model().cuda()
    optimizers = build_optimizers([model], ADAMW)
    optimizers.record_update_stats(True)
    for factor in (1.0, math.nan):
        (model(torch.ones(4, WIDTH, device="cuda")).sum() * factor).backward()
        norm = clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        before = local_state(model, optimizers)
        if factor != 1.0:  # the first step creates the state
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizers.step(found_inf=(~norm.isfinite()).float())
            optimizers.local_update_mean_squares()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    check_equal(local_state(model, optimizers), before)


def test_a_first_step_that_is_skipped_has_no_update() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([{"params": [parameter], "name": "all"}], lr=0.1)
    parameter.grad = torch.ones(4)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    # no step has been counted, so that the bias corrections are 0
    assert optimizer.local_update_squared_norms() == {"all": 0}
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    # of the first step each element's update is 1
    assert float(optimizer.local_update_squared_norms()["all"]) == pytest.approx(4.0, rel=1e-4)


def test_a_step_after_a_skipped_one_is_not_skipped() -> None:
    model = nn.Linear(4, 4)
    groups: dict[str, ParameterGroup] = {
        "matrices": MuonGroup(parameters=["weight"], lr=0.1),
        "vectors": AdamWGroup(parameters=["bias"], lr=0.1),
    }
    optimizers = build_optimizers([model], OptimizerConfig(groups=groups))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizers.step(found_inf=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # by an optimizer itself, which keeps no flag of the step before
    for optimizer in optimizers:
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
