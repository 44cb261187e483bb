"""Fixed norms over every kind of optimizer: the rule, skipped steps, recorded updates, ranks, resume."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from errors import UserError
from optimizers.config import AdamWGroup, OptimizerConfig, SOAPGroup
from optimizers.param_groups import assign_parameters
from optimizers.titan import ParamGroupOptimizers, build_optimizers
from tests.optimizers.test_every_optimizer import (
    KINDS,
    check_equal,
    check_mean_squares,
    each_kind,
    make_config,
    train,
)
from tests.optimizers.test_skipped_step import Model, check_skipped_steps, full_tensors, sharded_model
from tests.ranks import run_ranks


def make_fixed(kind: str, fixed_norm: bool = True) -> OptimizerConfig:
    """The groups of make_config, with fixed norms for the matrices of layers and output."""
    groups = dict(make_config(kind).groups)
    for name in ("hidden", "output"):
        groups[name] = dataclasses.replace(groups[name], weight_decay=0.0, fixed_norm=fixed_norm)
    return OptimizerConfig(groups=groups)


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)


@each_kind
def test_a_step_is_the_optimizers_on_the_sphere(kind: str) -> None:
    fixed, free = Model().double(), Model().double()
    fixed_optimizers = build_optimizers([fixed], make_fixed(kind))
    free_optimizers = build_optimizers([free], make_fixed(kind, fixed_norm=False))
    rates = {"layers": 0.02, "output": 0.01}
    for step in range(4):
        before = full_tensors(fixed)
        free.load_state_dict(fixed.state_dict())
        for model, optimizers in ((fixed, fixed_optimizers), (free, free_optimizers)):
            set_gradients(model, step)
            optimizers.step()
        free_weights = full_tensors(free)
        for name, weight in full_tensors(fixed).items():
            old, change = before[name], before[name] - free_weights[name]
            if name.endswith("bias") or not change.any():  # SOAP's first step
                assert torch.equal(weight, free_weights[name])
                continue
            moved = old - rates[name.split(".")[0]] * old.norm() * change / change.norm()
            expected = moved * old.norm() / moved.norm()
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
            assert step == 0 or not torch.equal(weight, old)


def test_adamw_on_the_sphere_equals_a_plain_statement_of_the_rule() -> None:
    beta1, beta2, eps, lr = 0.8, 0.7, 1e-6, 0.1
    for seed in range(5):
        layer = nn.Linear(5, 3, bias=False).double()
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
        group = AdamWGroup(parameters=["weight"], lr=lr, beta1=beta1, beta2=beta2, eps=eps, fixed_norm=True)
        optimizers = build_optimizers([layer], OptimizerConfig(groups={"all": group}))
        w = layer.weight.detach().clone()
        radius = w.norm()
        m = v = torch.zeros_like(w)
        for n in range(1, 8):
            set_gradients(layer, 10 * seed + n)
            g = layer.weight.grad
            assert g is not None
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            u = m / (1 - beta1**n) / ((v / (1 - beta2**n)).sqrt() + eps)
            w = w - lr * radius * u / u.norm()
            w = radius * w / w.norm()
            optimizers.step()
        torch.testing.assert_close(layer.weight.detach(), w, rtol=0, atol=1e-12)


def test_the_initial_norm_is_kept_over_many_small_steps() -> None:
    layer = nn.Linear(24, 24, bias=False)
    initial = layer.weight.detach().double().norm()
    group = AdamWGroup(parameters=["weight"], lr=2e-4, fixed_norm=True)
    optimizers = build_optimizers([layer], OptimizerConfig(groups={"all": group}))
    start = layer.weight.detach().clone()
    for step in range(1000):
        layer.weight.grad = torch.randn(24, 24, generator=torch.Generator().manual_seed(step)) + 0.5
        optimizers.step()
    assert (layer.weight - start).norm() > 0.1 * initial
    assert abs(float(layer.weight.detach().double().norm() / initial) - 1.0) < 1e-6


def test_what_does_not_change_stays() -> None:
    layer = nn.Linear(3, 3, bias=False)
    group = AdamWGroup(parameters=["weight"], lr=0.1, fixed_norm=True)
    optimizers = build_optimizers([layer], OptimizerConfig(groups={"all": group}))
    before = layer.weight.detach().clone()
    optimizers.step()
    layer.weight.grad = torch.zeros(3, 3)
    optimizers.step()
    assert torch.equal(layer.weight, before)


@each_kind
def test_a_matrix_of_zeros_stays_zero(kind: str) -> None:
    model = Model().double()
    optimizers = build_optimizers([model], make_fixed(kind))
    nn.init.zeros_(model.get_parameter("layers.1.weight"))
    before = full_tensors(model)
    for step in range(3):
        set_gradients(model, step)
        optimizers.step()
    changed = {name for name, p in full_tensors(model).items() if not torch.equal(p, before[name])}
    assert changed == before.keys() - {"layers.1.weight"}


@each_kind
def test_a_gradient_of_nan_shows_in_the_weights(kind: str) -> None:
    model = Model().double()
    optimizers = build_optimizers([model], make_fixed(kind))
    if kind == "soap":  # whose first step changes no weight
        set_gradients(model, 0)
        optimizers.step()
    set_gradients(model, 1)
    gradient = model.get_parameter("layers.1.weight").grad
    assert gradient is not None
    gradient[0, 0] = torch.nan
    optimizers.step()
    assert model.get_parameter("layers.1.weight").isnan().any()
    assert model.get_parameter("layers.0.weight").isfinite().all()


@each_kind
def test_skipped_steps_and_recorded_updates(kind: str) -> None:
    check_skipped_steps(Model, make_fixed(kind))
    check_mean_squares(Model, make_fixed(kind))


def build(model: nn.Module, kind: str) -> ParamGroupOptimizers:
    return build_optimizers([model], make_fixed(kind))


def worker(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=num_ranks)
    shape = (2,) if num_ranks == 2 else (2, 2)
    for kind in KINDS:
        whole = torch.load(f"{folder}/{kind}.pt")
        models = [sharded_model(shape) for _ in range(2)]
        (sharded, optimizers), (resumed, states) = ((model, build(model, kind)) for model in models)
        train(sharded, optimizers, range(4))
        torch.testing.assert_close(full_tensors(sharded), whole, rtol=0, atol=1e-5)
        checkpoint = f"{folder}/{kind}"
        dcp.save({"model": sharded.state_dict(), "optimizer": optimizers}, checkpoint_id=checkpoint)
        dcp.load({"model": resumed.state_dict(), "optimizer": states}, checkpoint_id=checkpoint)
        for each in ((sharded, optimizers), (resumed, states)):
            train(*each, range(4, 6))
        check_equal(sharded, resumed)
        check_mean_squares(lambda: sharded_model(shape), make_fixed(kind))
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_steps_equal_those_of_one_rank(num_ranks: int, tmp_path: Path) -> None:
    for kind in KINDS:
        model = Model()
        train(model, build(model, kind), range(4))
        for name, p in full_tensors(model).items():
            start = full_tensors(Model())[name]
            assert name.endswith("bias") or float(p.norm() / start.norm()) == pytest.approx(1.0, abs=1e-6)
        torch.save(full_tensors(model), tmp_path / f"{kind}.pt")
    run_ranks(worker, num_ranks, num_ranks, str(tmp_path))


def test_vectors_weight_decay_and_large_rates_are_refused() -> None:
    group = AdamWGroup(parameters=[".*"], lr=0.1, fixed_norm=True)
    with pytest.raises(UserError, match=r"fixed_norm groups match parameters that are not matrices: bias"):
        assign_parameters(nn.Linear(2, 2).named_parameters(), {"all": group})
    values: tuple[dict[str, Any], ...] = ({"lr": 0.1, "weight_decay": 0.1}, {"lr": 1.0})
    for each in values:
        with pytest.raises(UserError, match="fixed_norm"):
            SOAPGroup(parameters=[".*"], fixed_norm=True, **each)
