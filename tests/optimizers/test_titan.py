import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from errors import UserError
from optimizers.config import AdamWGroup, MuonGroup, OptimizerConfig, ScheduleConfig
from optimizers.muon import Muon
from optimizers.titan import ParamGroupOptimizers, ParamGroupScheduler, build_lr_schedulers, build_optimizers

CONFIG = OptimizerConfig(
    groups={
        "hidden": MuonGroup(parameters=[r"layers\..*weight"], lr=0.02, weight_decay=0.1, dtype="float32"),
        "embedding": AdamWGroup(parameters=[r"embedding\.weight"], lr=0.003),
        "gains": AdamWGroup(parameters=[r"norm\.weight"], lr=0.001, beta2=0.99, weight_decay=0.2),
    }
)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SCHEDULE = ScheduleConfig(kind="wsd", warmup_steps=4, decay_ratio=0.5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)])
        self.norm = nn.RMSNorm(8)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.output(self.norm(x + self.layers[1](self.layers[0](x).tanh())))


def build(
    config: OptimizerConfig = CONFIG, device: str = "cpu"
) -> tuple[Model, ParamGroupOptimizers, ParamGroupScheduler]:
    model = Model().to(device)
    optimizers = build_optimizers([model], config)
    return model, optimizers, build_lr_schedulers(optimizers, SCHEDULE, 20)


def train(
    model: nn.Module, optimizers: ParamGroupOptimizers, schedule: ParamGroupScheduler, steps: range
) -> None:
    for step in steps:
        tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(step))
        tokens = tokens.to(next(model.parameters()).device)
        optimizers.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizers.step()
        schedule.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def with_hidden(**values: Any) -> OptimizerConfig:
    hidden = dataclasses.replace(CONFIG.groups["hidden"], **values)
    return OptimizerConfig(groups={**CONFIG.groups, "hidden": hidden})


def test_one_muon_and_one_adamw_with_one_param_group_per_group() -> None:
    model, optimizers, _ = build()
    muon, adamw = optimizers
    assert isinstance(muon, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["name"], g["base_lr"], g["weight_decay"]) for g in muon.param_groups] == [
        ("hidden", 0.02, 0.1)
    ]
    assert [g["name"] for g in adamw.param_groups] == ["embedding", "gains"]
    assert adamw.param_groups[1]["betas"] == (0.9, 0.99)
    assert [g["params"] for g in adamw.param_groups] == [[model.embedding.weight], [model.norm.weight]]


@DEVICES
def test_adamw_groups_equal_torch_adamw(device: str) -> None:
    model, optimizers, schedule = build(device=device)
    reference = Model().to(device)
    groups = [
        {"params": [reference.embedding.weight], "lr": 0.003, "weight_decay": 0.0, "betas": (0.9, 0.95)},
        {"params": [reference.norm.weight], "lr": 0.001, "weight_decay": 0.2, "betas": (0.9, 0.99)},
    ]
    adamw = torch.optim.AdamW(groups, eps=1e-8, foreach=False)
    for step in range(5):
        train(model, optimizers, schedule, range(step, step + 1))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for group, peak in zip(adamw.param_groups, (0.003, 0.001), strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 4)
        adamw.step()
    torch.testing.assert_close(model.embedding.weight, reference.embedding.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model.norm.weight, reference.norm.weight, rtol=1e-6, atol=1e-7)


def test_scheduler_sets_learning_rates() -> None:
    _, optimizers, schedule = build()
    assert schedule.lr_by_group() == {"hidden": 0.005, "embedding": 0.00075, "gains": 0.00025}
    for _ in range(15):
        schedule.step()
    # step 15 is the middle of the decay from 10 to 20
    assert schedule.lr_by_group() == {"hidden": 0.01, "embedding": 0.0015, "gains": 0.0005}
    assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.01, 0.0015, 0.0005]


def test_scheduler_sets_weight_decays() -> None:
    _, optimizers, schedule = build(with_hidden(weight_decay_gamma=2.0))
    for step in range(21):
        assert schedule.weight_decay_by_group() == {
            "hidden": pytest.approx(0.1 * (1 - max(step - 10, 0) / 10) ** 2),
            "embedding": 0.0,
            "gains": 0.2,  # constant without gamma
        }
        values = {g["name"]: g["weight_decay"] for o in optimizers for g in o.param_groups}
        assert values == schedule.weight_decay_by_group()
        schedule.step()


@DEVICES
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_weight_decay_is_annealed_in_the_update(kind: str, device: str) -> None:
    hidden = AdamWGroup(parameters=[r"layers\..*weight"], lr=0.02, weight_decay=0.5, weight_decay_gamma=2.0)
    annealed = with_hidden(weight_decay=0.5, weight_decay_gamma=2.0)
    if kind == "adamw":
        annealed = OptimizerConfig(groups={**CONFIG.groups, "hidden": hidden})
    model, optimizers, schedule = build(annealed, device)
    schedule.load_state_dict({"step": 15})  # the middle of the decay phase
    before = weights(model)["layers.0.weight"]
    for q in model.parameters():
        q.grad = torch.zeros_like(q)  # the update is weight decay only
    optimizers.step()
    expected = before * (1 - 0.5 * 0.02 * 0.5 * 0.25)
    torch.testing.assert_close(weights(model)["layers.0.weight"], expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_annealing_resumes(tmp_path: Path) -> None:
    config = with_hidden(weight_decay_gamma=2.0)
    whole, first, second = build(config), build(config), build(config)
    train(*whole, range(20))
    train(*first, range(13))
    dcp.save({"optimizer": first[1], "lr_scheduler": first[2]}, checkpoint_id=tmp_path, no_dist=True)
    second[0].load_state_dict(first[0].state_dict())
    dcp.load({"optimizer": second[1], "lr_scheduler": second[2]}, checkpoint_id=tmp_path, no_dist=True)
    assert second[2].weight_decay_by_group()["hidden"] == pytest.approx(0.1 * 0.7**2)
    train(*second, range(13, 20))
    for name, weight in weights(whole[0]).items():
        assert torch.equal(weights(second[0])[name], weight), name


@DEVICES
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_resumed_run_is_bit_identical(device: str, tmp_path: Path) -> None:
    whole = build(device=device)
    train(*whole, range(10))
    first = build(device=device)
    train(*first, range(5))
    saved = {"model": first[0].state_dict(), "optimizer": first[1], "lr_scheduler": first[2]}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    second = build(device=device)
    loaded = {"model": second[0].state_dict(), "optimizer": second[1], "lr_scheduler": second[2]}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert second[2].state_dict() == {"step": 5}
    train(*second, range(5, 10))
    for name, weight in weights(whole[0]).items():
        assert torch.equal(weights(second[0])[name], weight), name


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_with_a_parameter_without_gradient_loads(kind: str, tmp_path: Path) -> None:
    config = with_hidden(row_beta2=0.9)
    if kind == "adamw":
        config = OptimizerConfig(groups={"all": AdamWGroup(parameters=[".*"], lr=0.01)})

    def built() -> tuple[Model, ParamGroupOptimizers, ParamGroupScheduler]:
        model = Model()
        unused = nn.Linear(8, 12, bias=False)
        unused.weight.data.fill_(1.0)
        model.layers.append(unused)
        optimizers = build_optimizers([model], config)
        return model, optimizers, build_lr_schedulers(optimizers, SCHEDULE, 20)

    whole, first, second = built(), built(), built()
    train(*whole, range(6))
    train(*first, range(3))
    dcp.save({"optimizer": first[1], "lr_scheduler": first[2]}, checkpoint_id=tmp_path, no_dist=True)
    second[0].load_state_dict(first[0].state_dict())
    dcp.load({"optimizer": second[1], "lr_scheduler": second[2]}, checkpoint_id=tmp_path, no_dist=True)
    second[1].record_update_stats(True)
    train(*second, range(3, 6))
    for name, weight in weights(whole[0]).items():
        assert torch.equal(weights(second[0])[name], weight), name
    mean_squares = second[1].local_update_mean_squares().values()
    assert all(value.isfinite() and value > 0 for value in mean_squares)


def test_saving_does_not_change_training() -> None:
    plain, saving = build(), build()
    saving[1].state_dict()
    for step in range(4):
        train(*plain, range(step, step + 1))
        train(*saving, range(step, step + 1))
        saving[1].state_dict()
    for name, weight in weights(plain[0]).items():
        assert torch.equal(weights(saving[0])[name], weight), name


def test_loading_keeps_the_hyperparameters_of_the_configuration() -> None:
    model, optimizers, schedule = build()
    train(model, optimizers, schedule, range(3))
    state = copy.deepcopy(optimizers.state_dict())
    _, changed, _ = build(with_hidden(lr=0.5, weight_decay=0.7, momentum=0.5, scale="spectral"))
    before = [{k: v for k, v in g.items() if k != "params"} for o in changed for g in o.param_groups]
    changed.load_state_dict(state)
    assert [{k: v for k, v in g.items() if k != "params"} for o in changed for g in o.param_groups] == before
    assert before[0]["weight_decay"] == 0.7
    loaded = changed.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(loaded[key], value), key


def test_loading_the_state_of_other_groups_is_an_error() -> None:
    _, optimizers, _ = build()
    moved = OptimizerConfig(groups={"all": AdamWGroup(parameters=[".*"], lr=0.01)})
    _, other, _ = build(moved)
    with pytest.raises(UserError, match=r"does not fit.*state\.layers\.0\.weight"):
        other.load_state_dict(optimizers.state_dict())


def test_a_group_can_be_in_any_of_several_model_parts() -> None:
    first, second = nn.Module(), nn.Module()
    first.embedding, first.layers = nn.Embedding(11, 8), nn.ModuleList([nn.Linear(8, 8, bias=False)])
    second.norm, second.layers = nn.RMSNorm(8), nn.ModuleDict({"1": nn.Linear(8, 8, bias=False)})
    optimizers = build_optimizers([first, second], CONFIG)
    assert [[g["name"] for g in o.param_groups] for o in optimizers] == [
        ["hidden"],
        ["embedding"],
        ["hidden"],
        ["gains"],
    ]
    state = optimizers.state_dict()
    assert {"state.layers.0.weight.momentum_buffer", "state.layers.1.weight.momentum_buffer"} < state.keys()
    optimizers.load_state_dict(state)


def test_step_hooks_of_the_container_run() -> None:
    model, optimizers, schedule = build()
    calls: list[int] = []
    optimizers.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizers, schedule, range(2))
    assert calls == [1, 1]


def test_the_scheduler_updates_the_param_groups_of_a_loaded_state() -> None:
    _, saved, _ = build()
    _, optimizers, schedule = build()
    optimizers.load_state_dict(saved.state_dict())
    schedule.load_state_dict({"step": 18})  # in the decay phase, steps 10 to 20
    rates = {group["name"]: group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert rates == pytest.approx({"hidden": 0.02 * 0.2, "embedding": 0.003 * 0.2, "gains": 0.001 * 0.2})
