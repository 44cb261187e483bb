"""What every optimizer owes to resume, dry run and metrics; a new kind joins by ParameterGroup."""

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from config import kind_of, load
from errors import UserError
from optimizers.base import GroupOptimizer, local, local_gradient
from optimizers.build import build_group_optimizers, create_missing_state, state_by_group
from optimizers.config import AdamWGroup, Group, OptimizerConfig, ParameterGroup
from optimizers.titan import ParamGroupOptimizers, build_optimizers
from tests.optimizers.test_skipped_step import (
    Model,
    backward,
    check_skipped_steps,
    full_tensors,
    sharded_model,
)
from tests.ranks import run_ranks
from training.config_help import describe_config
from training.dry_run import dry_run
from training.memory import checkpoint_bytes, estimate_memory
from training.preflight import build_meta_model
from training.run_config import RunConfig
from training.step_time import estimate_step_time

ROOT = Path(__file__).parents[2]
KINDS: dict[str, type[Group]] = {kind_of(group): group for group in get_args(ParameterGroup)}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make_config(kind: str) -> OptimizerConfig:
    """Matrices, the output and vectors by one kind, each as far as it takes them; the others by AdamW."""
    # numbers of ranks are comparable in fp32 only
    options: dict[str, Any] = {"dtype": "float32"} if "dtype" in KINDS[kind].__dataclass_fields__ else {}
    takes_vectors = KINDS[kind](parameters=["a"], lr=0.1).misfit((5,)) is None
    vectors = KINDS[kind if takes_vectors else "adamw"]
    groups = {
        "hidden": KINDS[kind](parameters=[r"layers\..*weight"], lr=0.02, weight_decay=0.1, **options),
        "output": KINDS[kind](parameters=[r"output\.weight"], lr=0.01, weight_decay=0.3, **options),
        "vectors": vectors(parameters=[r".*bias"], lr=0.003),
    }
    return OptimizerConfig(groups=groups)  # pyrefly: ignore [bad-argument-type]


class Descent(GroupOptimizer):
    """Gradient descent, with momentum in some groups: an optimizer that does not measure its updates."""

    def __init__(self, params: Any, *, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    def create_state(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        if group["name"] != "output":
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore [bad-override]
        create_missing_state(self)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                weight, update = local(p), local_gradient(p)
                if self.state[p]:
                    momentum = local(self.state[p]["momentum"])
                    update = momentum.lerp(update, 0.5)
                    self.assign(momentum, update)
                decay = 1.0 - group["lr"] * group["weight_decay"]
                self.assign(weight, weight * decay - group["lr"] * update)


def build_descent(parts: list[nn.Module], config: OptimizerConfig) -> ParamGroupOptimizers:
    """Build the optimizers of a model, and replace them by descent."""
    optimizers = build_optimizers(parts, config)
    groups = [dict(group) for optimizer in optimizers for group in optimizer.param_groups]
    descent: list[GroupOptimizer] = [Descent(groups, lr=0.0)]
    optimizers.optimizers, optimizers._by_part = descent, [descent]
    return optimizers


def train(model: nn.Module, optimizers: ParamGroupOptimizers, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizers.step()


@each_kind
def test_the_config_help_describes_every_key(kind: str) -> None:
    text = describe_config("optimizer.groups.NAME")
    section = text.split(f'## [optimizer.groups.NAME], kind = "{kind}"')[1].partition("\n## ")[0]
    for field in dataclasses.fields(KINDS[kind]):
        assert field.name == "kind" or f"* `{field.name}` (" in section, field.name


@each_kind
def test_what_makes_no_group_is_refused(kind: str) -> None:
    wrong: tuple[dict[str, Any], ...] = (
        *({"lr": -1.0}, {"lr": 2.0, "weight_decay": 1.0}),
        *({"parameters": []}, {"parameters": ["("]}),
    )
    for values in wrong:
        given: dict[str, Any] = {"parameters": ["a"], "lr": 0.1, **values}
        with pytest.raises(UserError):
            KINDS[kind](**given)


@each_kind
@pytest.mark.parametrize("size", ["debug_softmax_muon", "0.6b_parallax_muon"])
def test_the_dry_run_counts_state_and_time(kind: str, size: str) -> None:
    group = ["--optimizer.groups.hidden.kind", kind, "--optimizer.groups.hidden.lr", "0.001"]
    run = load(RunConfig, ROOT / "configs" / f"{size}.toml", group)
    assert run.optimizer.groups["hidden"].kind == kind
    assert "memory, optimizer" in dry_run(run, 1)
    model = build_meta_model(run)
    time = estimate_step_time(run, model, 8)
    assert time is not None
    assert time.optimizer > 0
    states = state_by_group(model.named_parameters(), run.optimizer.groups)
    num_bytes = sum(state.nbytes for tensors in states.values() for state in tensors)
    assert estimate_memory(run, model, 1).optimizer == num_bytes > 0
    assert checkpoint_bytes(run, model, 1) > 4 * model.num_parameters()["total"] + num_bytes


@each_kind
def test_the_estimated_state_is_that_after_a_step(kind: str) -> None:
    model, config = Model(), make_config(kind)
    expected = state_by_group(model.named_parameters(), config.groups)
    optimizers = build_optimizers([model], config)
    train(model, optimizers, range(2))
    found: dict[str, list[torch.Tensor]] = {name: [] for name in config.groups}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                found[group["name"]] += [x for x in optimizer.state[p].values() if x.ndim > 0]
    for name, states in expected.items():
        assert all(state.is_meta for state in states)
        assert [(x.shape, x.dtype) for x in states] == [(x.shape, x.dtype) for x in found[name]], name


@each_kind
def test_created_state_is_that_of_the_first_step(kind: str) -> None:
    models = Model(), Model()
    first, second = (build_optimizers([model], make_config(kind)) for model in models)
    for optimizer in second:
        create_missing_state(optimizer)
    train(models[0], first, range(3))
    train(models[1], second, range(3))
    check_equal(models[0], models[1])


def check_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(full_tensors(model).items(), full_tensors(other).values(), strict=True):
        assert torch.equal(p, q), name


@each_kind
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_resume_is_bit_identical(kind: str, steps: int, tmp_path: Path) -> None:
    config = make_config(kind)
    models = Model(), Model(), Model()
    whole, first, second = ((model, build_optimizers([model], config)) for model in models)
    train(*whole, range(6))
    train(*first, range(steps))
    dcp.save({"model": first[0].state_dict(), "optimizer": first[1]}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"model": second[0].state_dict(), "optimizer": second[1]}, checkpoint_id=tmp_path, no_dist=True)
    train(*second, range(steps, 6))
    check_equal(whole[0], second[0])
    for p, q in zip(Model().parameters(), whole[0].parameters(), strict=True):
        assert not torch.equal(p, q)


@each_kind
def test_a_skipped_step_changes_nothing(kind: str) -> None:
    check_skipped_steps(Model, make_config(kind))


@each_kind
def test_parameters_without_a_gradient_stay(kind: str) -> None:
    model = Model()
    optimizers = build_optimizers([model], make_config(kind))
    train(model, optimizers, range(1))
    before = full_tensors(model)
    backward(model, 1)
    model.get_parameter("layers.1.weight").grad = None
    optimizers.step()
    changed = {name for name, p in full_tensors(model).items() if not torch.equal(p, before[name])}
    assert changed == before.keys() - {"layers.1.weight"}


@each_kind
def test_a_learning_rate_of_zero_changes_no_weight(kind: str) -> None:
    model = Model()
    optimizers = build_optimizers([model], make_config(kind))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    optimizers.record_update_stats(True)
    train(model, optimizers, range(2))
    check_equal(model, Model())
    assert all(x.isfinite() for x in optimizers.local_update_mean_squares().values())


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_state_keep_their_dtypes(kind: str, dtype: torch.dtype) -> None:
    model = Model().to(dtype)
    optimizers = build_optimizers([model], make_config(kind))
    dtypes = []
    for step in range(2):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizers.step()
        assert {p.dtype for p in model.parameters()} == {dtype}
        dtypes.append([x.dtype for o in optimizers for state in o.state.values() for x in state.values()])
    assert dtypes[0] == dtypes[1]
    assert all(p.isfinite().all() for p in model.parameters())


def check_mean_squares(
    make: Callable[[], nn.Module], config: OptimizerConfig, build: Any = build_optimizers
) -> None:
    """Compare the recorded sizes of updates with the changes of the weights, for every group."""
    model = make()
    optimizers = build([model], config)
    members = {
        "hidden": [f"layers.{n}.weight" for n in range(3)],
        "output": ["output.weight"],
        "vectors": [*(f"layers.{n}.bias" for n in range(3)), "output.bias"],
    }
    for step in range(3):
        optimizers.record_update_stats(step > 0)
        before = full_tensors(model)
        train(model, optimizers, range(step, step + 1))
        if step == 0:
            continue
        squares = optimizers.local_update_mean_squares()
        assert [*squares] == [*config.groups]
        summed = torch.stack([*squares.values()])
        if dist.is_initialized():
            dist.all_reduce(summed)
        after = full_tensors(model)
        # a step that is skipped has no update
        for p in model.parameters():
            local_gradient(p).fill_(torch.nan)
        optimizers.step(found_inf=torch.ones(()))
        skipped = optimizers.local_update_mean_squares()
        assert [*skipped] == [*config.groups]
        assert all(square == 0 for square in skipped.values())
        assert all(spread == (0, 0, 0) for spread in optimizers.update_singular_values().values())
        for (name, group), square in zip(config.groups.items(), summed, strict=True):
            changes = [
                (before[n].double() * (1 - group.lr * group.weight_decay) - after[n]) / group.lr
                for n in members[name]
            ]
            expected = torch.cat([change.flatten() for change in changes]).square().mean()
            assert expected > 0
            torch.testing.assert_close(square.double(), expected, rtol=1e-3, atol=0)


@each_kind
def test_the_size_of_every_groups_update_is_recorded(kind: str) -> None:
    check_mean_squares(Model, make_config(kind))


@each_kind
def test_weights_that_do_not_move_have_no_update(kind: str) -> None:
    model = Model()
    optimizers = build_optimizers([model], make_config(kind))
    optimizers.record_update_stats(True)
    unmoved = []
    for step in range(3):
        backward(model, step)
        if step == 2:
            model.output.weight.grad = None
        before = full_tensors(model)
        optimizers.step()
        has_moved = {name: not torch.equal(p, before[name]) for name, p in full_tensors(model).items()}
        squares = optimizers.local_update_mean_squares()
        assert (squares["hidden"] > 0) == has_moved["layers.0.weight"]
        assert (squares.get("output", 0) > 0) == has_moved["output.weight"]
        unmoved.append([name for name, moved in has_moved.items() if not moved])
    assert unmoved[1:] == [[], ["output.weight"]]
    assert (unmoved[0] != []) == (kind == "soap")


def test_updates_that_the_optimizer_does_not_measure_are_measured() -> None:
    check_mean_squares(Model, make_config("adamw"), build_descent)
    check_skipped_steps(Model, make_config("adamw"), build_descent)


def worker(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=num_ranks)
    shape = (2,) if num_ranks == 2 else (2, 2)
    for kind in KINDS:
        config, sharded, whole = make_config(kind), sharded_model(shape), torch.load(f"{folder}/{kind}.pt")
        optimizers = build_optimizers([sharded], config)
        train(sharded, optimizers, range(4))
        torch.testing.assert_close(full_tensors(sharded), whole, rtol=0, atol=1e-5)
        for optimizer in optimizers:
            for p, state in optimizer.state.items():
                assert isinstance(p, DTensor)
                for value in (value for value in state.values() if value.ndim > 0):
                    assert isinstance(value, DTensor), kind
                    assert value.placements == p.placements, kind
        check_mean_squares(lambda: sharded_model(shape), config)
        check_skipped_steps(lambda: sharded_model(shape), config)
        resumed = sharded_model(shape)
        checkpoint = f"{folder}/{kind}"
        dcp.save({"model": sharded.state_dict(), "optimizer": optimizers}, checkpoint_id=checkpoint)
        states = build_optimizers([resumed], config)
        dcp.load({"model": resumed.state_dict(), "optimizer": states}, checkpoint_id=checkpoint)
        for each in ((sharded, optimizers), (resumed, states)):
            train(*each, range(4, 6))
        check_equal(sharded, resumed)
    check_mean_squares(lambda: sharded_model(shape), make_config("adamw"), build_descent)
    check_skipped_steps(lambda: sharded_model(shape), make_config("adamw"), build_descent)
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_steps_equal_those_of_one_rank(num_ranks: int, tmp_path: Path) -> None:
    for kind in KINDS:
        model = Model()
        train(model, build_optimizers([model], make_config(kind)), range(4))
        torch.save(full_tensors(model), tmp_path / f"{kind}.pt")
    run_ranks(worker, num_ranks, num_ranks, str(tmp_path))


def test_a_kind_without_a_case_is_not_built() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Forgotten(Group):
        kind: str = "forgotten"

    groups: Any = {"all": Forgotten(parameters=[".*"], lr=0.1)}
    with pytest.raises(AssertionError, match="Forgotten"):
        build_group_optimizers({"all": [*Model().parameters()]}, groups)


def test_state_of_some_or_no_parameters_is_saved_and_loaded() -> None:
    first, second = Model(), Model()
    optimizers, loaded = (build_descent([model], make_config("adamw")) for model in (first, second))
    train(first, optimizers, range(3))
    state = copy.deepcopy(optimizers.state_dict())  # which shares memory with the optimizers
    assert {key.rpartition(".")[2] for key in state} == {"momentum"}
    assert len(state) == 7  # of eight parameters
    second.load_state_dict(first.state_dict())
    loaded.load_state_dict(state)
    train(first, optimizers, range(3, 5))
    train(second, loaded, range(3, 5))
    check_equal(first, second)


def test_an_optimizer_without_state_is_saved_and_loaded() -> None:
    model = Model()
    optimizers = build_descent(
        [model], OptimizerConfig(groups={"output": AdamWGroup(parameters=[".*"], lr=0.1)})
    )
    assert optimizers.state_dict() == {}
    optimizers.load_state_dict({})
    before = copy.deepcopy(model)
    train(model, optimizers, range(1))
    assert optimizers.optimizers[0].param_groups[0]["lr"] == 0.1
    assert not torch.equal(model.output.weight, before.output.weight)
