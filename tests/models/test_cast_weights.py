"""Training on one rank without FSDP2: the same bits as with it, plain weights, and memory that is freed."""

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac

from models.cast_weights import cast_in_forward
from models.checkpoint.load import load_state
from models.config import AttentionConfig, GatedDeltaNetConfig, ModelConfig, ParallaxConfig, SoftmaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3
from models.sizes import ModelSize
from models.titan import TitanModelArgs, TitanQwen3, device_mesh, parallelize, shard
from optimizers.base import local
from optimizers.config import AdamWGroup, MuonGroup, OptimizerConfig, OrthogonalizedAdamWGroup, SOAPGroup
from optimizers.titan import build_optimizers

SIZE = ModelSize(width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=96)
V = 128
OTHERS = AdamWGroup(parameters=[r".*norm\.weight", r".*embeddings\.weight"], lr=1e-2)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


class Case(NamedTuple):
    attention: AttentionConfig = ParallaxConfig()
    checkpointing: Any = None
    is_compiled: bool = False
    reshards: bool = True
    is_tied: bool = True


def build(case: Case, *, sharded: bool, seed: int = 0) -> Qwen3:
    """Build a model for one rank, sharded by FSDP2 or as parallelize leaves it."""
    config = ModelConfig(
        size="custom", custom_size=SIZE, vocab_size=V, attention=case.attention, tie_embeddings=case.is_tied
    )
    model, mesh = Qwen3(config), device_mesh("cpu", 1, 1)
    init_weights(model, seed)
    if not sharded:
        return parallelize(
            model, mesh, precision=torch.bfloat16, activation_checkpointing=case.checkpointing,
            compile_blocks=case.is_compiled, reshard_after_forward=case.reshards,
        )  # fmt: skip
    if case.checkpointing is not None:
        apply_ac(model, ActivationCheckpoint(mode=case.checkpointing), model_compile_enabled=case.is_compiled)
    for block in model.layers if case.is_compiled else ():
        block.compile(fullgraph=True)
    shard(model, mesh, torch.bfloat16, case.reshards)
    return model


def loss_of(model: Qwen3, seed: int) -> torch.Tensor:
    ids = torch.randint(0, V, (1, 64), generator=torch.Generator().manual_seed(seed))
    bounds = torch.tensor([0, 20, 64], dtype=torch.int32)
    return model(ids, cu_seqlens=bounds, max_seqlen=64, labels_BT=ids.roll(-1, 1)) / 64


def train(model: Qwen3, step: Callable[[], Any], seeds: range) -> list[torch.Tensor]:
    """Train on two micro-batches a step; return losses, those of an evaluation too, gradients and weights."""
    parameters = list(model.parameters())
    found = []
    for seed in seeds:
        for parameter in parameters:
            parameter.grad = None
        for index in range(2):
            loss = loss_of(model, 2 * seed + index)
            loss.backward()
            found.append(loss.detach())
        found += [local(p.grad).clone() for p in parameters if p.grad is not None]
        step()
        with torch.no_grad():
            found.append(loss_of(model, 99))
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return [*found, *(local(p).detach().clone() for p in parameters)]


CASES = {
    "softmax": Case(SoftmaxConfig()),
    "kept": Case(reshards=False),
    "untied": Case(GatedDeltaNetConfig(), is_tied=False),
    "compiled": Case(is_compiled=True),
    "selective": Case(checkpointing="selective"),
    "full": Case(checkpointing="full"),
    "compiled-full": Case(checkpointing="full", is_compiled=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_gradients_and_weights_are_those_of_fsdp2_bit_by_bit(case: Case) -> None:
    expected, found = (
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-2).step, range(3))
        for model in (build(case, sharded=True), build(case, sharded=False))
    )
    assert len(expected) == len(found)
    for x, y in zip(expected, found, strict=True):
        assert x.dtype == y.dtype == torch.float32
        assert torch.equal(x, y)


MATRICES = [r"layers\.\d+\.(attention\.w|mlp\.).*"]
GROUPS = {
    "adamw": AdamWGroup(parameters=MATRICES, lr=1e-2),
    "muon": MuonGroup(parameters=MATRICES, lr=1e-2),
    "normuon": MuonGroup(parameters=MATRICES, lr=1e-2, row_beta2=0.95),
    "orthogonalized_adamw": OrthogonalizedAdamWGroup(parameters=MATRICES, lr=1e-2),
    "soap": SOAPGroup(parameters=MATRICES, lr=1e-2),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_a_checkpoint_of_either_kind_goes_on_as_the_other_bit_by_bit(kind: str, tmp_path: Path) -> None:
    config = OptimizerConfig(groups={"hidden": GROUPS[kind], "others": OTHERS})
    found = []
    for first in (False, True):
        for second in (False, True):
            folder = tmp_path / f"{first}-{second}" / "checkpoint" / "step-2"
            models = [
                build(Case(), sharded=sharded, seed=seed) for seed, sharded in enumerate((first, second))
            ]
            before, after = (build_optimizers([model], config) for model in models)
            train(models[0], before.step, range(2))
            dcp.save({**models[0].state_dict(), **before.state_dict()}, checkpoint_id=folder)
            state = {**models[1].state_dict(), **after.state_dict()}
            load_state(state, folder)
            after.load_state_dict({k: v for k, v in state.items() if k.startswith("state.")})
            found.append(train(models[1], after.step, range(2, 4)))
    for others in zip(*found, strict=True):
        assert all(torch.equal(others[0], other) for other in others[1:])


def test_parameters_stay_plain_and_fp32_and_keep_their_names() -> None:
    plain = build(Case(), sharded=True).state_dict()
    model = build(Case(), sharded=False)
    dtypes = set()
    model.layers[0].get_submodule("mlp.gate").register_forward_pre_hook(
        lambda module, inputs: dtypes.update((module.weight.dtype, inputs[0].dtype))
    )
    loss_of(model, 0).backward()
    assert dtypes == {torch.bfloat16}
    assert model.state_dict().keys() == plain.keys()
    for parameter in model.parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.grad is not None
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert not isinstance(parameter, DTensor)


def test_a_forward_that_fails_leaves_the_parameters() -> None:
    model = build(Case(), sharded=False)
    before = dict(model.named_parameters())
    handle = model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, 0)
    handle.remove()
    assert all(p is before[name] for name, p in model.named_parameters())


class Owner(nn.Module):
    """A module with a parameter of two names, a frozen and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = self.same = nn.Parameter(torch.ones(8))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(8))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = [self.gain, self.same, self.frozen]
        return x * self.gain + self.same * self.frozen


def test_a_parameter_of_two_names_is_cast_as_one_and_a_frozen_one_stays_frozen() -> None:
    module = Owner()
    cast_in_forward(module, [module], torch.bfloat16, recast_in_backward=True)
    for _ in range(2):
        module(torch.ones(8, dtype=torch.bfloat16)).sum().backward()
    assert module.seen[0] is module.seen[1]
    assert all(each.dtype == torch.bfloat16 for each in module.seen)
    assert [each.requires_grad for each in module.seen] == [True, True, False]
    assert module.gain.grad is not None
    assert torch.equal(module.gain.grad, torch.full((8,), 4.0))
    assert module.frozen.grad is None
    assert module.unused.grad is None


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_copy_which_would_compute_with_the_weights_of_the_original_is_refused(is_compiled: bool) -> None:
    model = build(Case(is_compiled=is_compiled), sharded=False)
    for module in (model, model.layers[0]):
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(module)


def test_a_compiled_module_casts_its_weights_also_where_its_caller_is_compiled() -> None:
    module = nn.Linear(8, 8)
    module.forward = torch.compile(module.forward, backend="eager")
    cast_in_forward(module, [module], torch.bfloat16, recast_in_backward=False)
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    found = torch.compile(lambda x: module(x), backend="eager")(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, module(x))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_in_fp32_nothing_is_cast(is_compiled: bool) -> None:
    model = Qwen3(ModelConfig(size="custom", custom_size=SIZE, vocab_size=V))
    parallelize(
        model, device_mesh("cpu", 1, 1), precision=torch.float32, activation_checkpointing=None,
        compile_blocks=is_compiled, reshard_after_forward=True,
    )  # fmt: skip
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list["weakref.ref[Any]"]:
    """References to the storages of all casts."""
    found: list[weakref.ref[Any]] = []
    copy = torch._foreach_copy_

    def spy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        copy(targets, sources)
        found.extend(weakref.ref(target.untyped_storage()) for target in targets)

    monkeypatch.setattr(torch, "_foreach_copy_", spy)
    return found


@pytest.mark.parametrize("name", ["softmax", "compiled", "selective", "full"])
def test_the_casts_of_blocks_are_freed_between_forward_and_backward(
    name: str, casts: list["weakref.ref[Any]"]
) -> None:
    model = build(CASES[name], sharded=False)
    loss = loss_of(model, 0)
    assert len(casts) == len(list(model.parameters()))
    # the gain of the last norm, outside of the blocks
    assert sum(each() is not None for each in casts) == 1
    loss.backward()


def test_eager_activation_checkpointing_still_frees_activations() -> None:
    model = build(CASES["full"], sharded=False)
    found: list[weakref.ref[Any]] = []
    model.layers[0].get_submodule("mlp.down").register_forward_pre_hook(
        lambda module, inputs: found.append(weakref.ref(inputs[0].untyped_storage()))
    )
    loss = loss_of(model, 0)
    assert [each() for each in found] == [None]
    loss.backward()


def test_the_casts_of_blocks_are_kept_where_the_config_says_so(casts: list["weakref.ref[Any]"]) -> None:
    loss = loss_of(build(CASES["kept"], sharded=False), 0)
    # all but the embedding, whose backward does not read it
    assert sum(each() is not None for each in casts) == len(casts) - 1
    loss.backward()
    del loss
    assert not any(each() is not None for each in casts)


def test_outputs_that_autograd_keeps_are_freed_without_a_backward() -> None:
    model = build(Case(), sharded=False)
    found: list[weakref.ref[Any]] = []

    def exponentiate(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        result = output.exp()
        found.append(weakref.ref(result.untyped_storage()))
        return result

    model.layers[0].get_submodule("mlp").register_forward_hook(exponentiate)
    loss = loss_of(model, 0)
    assert found[0]() is not None
    del loss
    assert found[0]() is None


def test_the_trainer_s_to_empty_unties_embedding_and_head_and_init_weights_ties_them() -> None:
    with torch.device("meta"):
        model = TitanQwen3(
            TitanModelArgs(config=ModelConfig(size="custom", custom_size=SIZE, vocab_size=V), seed=1)
        )
    parallelize(
        model, device_mesh("cpu", 1, 1), precision=torch.bfloat16, activation_checkpointing=None,
        compile_blocks=False, reshard_after_forward=True,
    )  # fmt: skip
    model.to_empty(device="cpu")
    model.init_weights()
    assert model.output.weight is model.tok_embeddings.weight
    reference = Qwen3(model.config)
    init_weights(reference, 1)
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
