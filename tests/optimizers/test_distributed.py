import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from optimizers.config import AdamWGroup, MuonGroup, OptimizerConfig, ScheduleConfig
from optimizers.titan import ParamGroupOptimizers, build_lr_schedulers, build_optimizers
from tests.ranks import run_ranks

# 5 and 7 rows are sharded unevenly over 2 ranks; of 1 row, one rank has nothing
WIDTHS = (8, 5, 7, 7, 7, 1)
STEPS = 5


def make_config(orthogonalization: str, row_beta2: float | None = None) -> OptimizerConfig:
    assert orthogonalization in ("newton_schulz5", "polar_express")
    hidden = MuonGroup(
        parameters=[r"layers\.\d+\.weight"],
        lr=0.02,
        weight_decay=0.1,
        dtype="float32",
        orthogonalization=orthogonalization,
        row_beta2=row_beta2,
    )
    return OptimizerConfig(
        groups={"hidden": hidden, "rest": AdamWGroup(parameters=[r"(norm|output)\..*"], lr=0.01)}
    )


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in pairwise(WIDTHS))
        self.norm = nn.RMSNorm(WIDTHS[-2])
        self.output = nn.Linear(WIDTHS[-2], 3)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.output(self.norm(x)) * self.layers[-1](x)


def train(
    model: nn.Module, optimizers: ParamGroupOptimizers, rank: int, num_ranks: int, steps: range
) -> None:
    schedule = build_lr_schedulers(optimizers, ScheduleConfig(kind="wsd", warmup_steps=2), 2 * STEPS)
    schedule.load_state_dict({"step": steps.start})
    for step in steps:
        x = torch.randn(8, WIDTHS[0], generator=torch.Generator().manual_seed(step))
        optimizers.zero_grad()
        (model(x[rank::num_ranks]).square().sum() / 8).backward()
        optimizers.step()
        schedule.step()


def sharded_model(shape: tuple[int, ...]) -> Model:
    model = Model()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no PREMUL_SUM; the loss is already divided by the global batch size
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model


def full_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def check_equals_one_rank(
    shape: tuple[int, ...], orthogonalization: str, row_beta2: float | None = None
) -> None:
    config, unsharded = make_config(orthogonalization, row_beta2), Model()
    train(unsharded, build_optimizers([unsharded], config), 0, 1, range(STEPS))
    model = sharded_model(shape)
    optimizers = build_optimizers([model], config)
    train(model, optimizers, dist.get_rank(), dist.get_world_size(), range(STEPS))
    torch.testing.assert_close(full_tensors(model), full_tensors(unsharded), rtol=0, atol=1e-6)
    start = Model()
    moved = {name: (p - full_tensors(start)[name]).abs().max() for name, p in full_tensors(model).items()}
    assert min(moved.values()) > 1e-2, moved
    layer = model.layers[0].weight
    assert isinstance(layer, DTensor)
    buffer = optimizers.optimizers[0].state[layer]["momentum_buffer"]
    assert isinstance(buffer, DTensor)
    assert buffer.placements == layer.placements
    assert buffer.to_local().shape == layer.to_local().shape


def check_resume_is_bit_identical(shape: tuple[int, ...], folder: str) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    models = [sharded_model(shape) for _ in range(3)]
    config = make_config("newton_schulz5")
    uninterrupted, first, second = ((model, build_optimizers([model], config)) for model in models)
    train(*uninterrupted, rank, num_ranks, range(STEPS))
    train(*first, rank, num_ranks, range(3))
    dcp.save({"model": first[0].state_dict(), "optimizer": first[1]}, checkpoint_id=folder)
    dcp.load({"model": second[0].state_dict(), "optimizer": second[1]}, checkpoint_id=folder)
    train(*second, rank, num_ranks, range(3, STEPS))
    for name, weight in full_tensors(uninterrupted[0]).items():
        assert torch.equal(full_tensors(second[0])[name], weight), name


def check_loads_on_one_rank(folder: str) -> None:
    """Resume from the checkpoint of check_resume_is_bit_identical without sharding."""
    unsharded, resumed = Model(), Model()
    train(unsharded, build_optimizers([unsharded], make_config("newton_schulz5")), 0, 1, range(STEPS))
    optimizers = build_optimizers([resumed], make_config("newton_schulz5"))
    dcp.load({"model": resumed.state_dict(), "optimizer": optimizers}, checkpoint_id=folder, no_dist=True)
    train(resumed, optimizers, 0, 1, range(3, STEPS))
    torch.testing.assert_close(full_tensors(resumed), full_tensors(unsharded), rtol=0, atol=1e-6)


def worker(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=num_ranks)
    if num_ranks == 2:
        check_equals_one_rank((2,), "newton_schulz5")
        check_equals_one_rank((2,), "polar_express")
        check_equals_one_rank((2,), "newton_schulz5", row_beta2=0.9)
        check_resume_is_bit_identical((2,), f"{folder}/checkpoint")
    else:
        check_equals_one_rank((2, 2), "newton_schulz5")
        check_equals_one_rank((4,), "newton_schulz5")
        check_equals_one_rank((2, 2), "newton_schulz5", row_beta2=0.9)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_training_equals_training_on_one_rank(num_ranks: int, tmp_path: Path) -> None:
    # all ranks share one import of torch
    run_ranks(worker, num_ranks, num_ranks, str(tmp_path))
    if num_ranks == 2:
        check_loads_on_one_rank(f"{tmp_path}/checkpoint")
