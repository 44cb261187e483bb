"""What every attention owes to training, decoding and the dry run; a new kind joins by AttentionConfig."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest
import torch
from torch import nn

from models import sizes
from models.attention.base import HeadProjections
from models.config import AttentionConfig, ModelConfig, ParallaxConfig, SoftmaxConfig
from models.generation.cache import Cache, extend, prefill
from models.init import init_weights
from models.qwen3 import Qwen3, build_attention
from tests.models.test_qwen3 import ATTENTIONS, TINY, VOCAB, build, tokens

each_attention = pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda a: str(a).split("(", 1)[1][:60])


@pytest.fixture(autouse=True)
def _tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def test_every_kind_is_tested() -> None:
    assert {type(attention) for attention in ATTENTIONS} == {*get_args(AttentionConfig)}


def test_a_kind_without_a_case_in_build_attention_is_not_built() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Forgotten:
        kind: Literal["forgotten"] = "forgotten"

    config: Any = ModelConfig(size="tiny", vocab_size=VOCAB, attention=Forgotten())  # pyrefly: ignore
    with pytest.raises(AssertionError, match="Forgotten"):
        build_attention(config, 0)


@each_attention
def test_parameters_are_counted_and_initialized(attention: AttentionConfig) -> None:
    model = build(attention)
    counts = model.num_parameters()
    assert counts["attention"] > 0
    assert counts["total"] == sum(counts[part] for part in ("embedding", "attention", "mlp", "norms"))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 10.0, name


@each_attention
def test_counts_of_flops_and_activations(attention: AttentionConfig) -> None:
    for module in build(attention).attention_modules():
        weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        assert module.projection_flops_per_token() == 6 * weights
        assert module.num_saved_elements_per_token() > 0
        per_token = [module.product_flops_per_token(length) for length in (1, 64, 4096)]
        assert per_token == sorted(per_token)


@each_attention
@pytest.mark.parametrize("length", [5, 40])
def test_the_cache_has_the_counted_elements(attention: AttentionConfig, length: int) -> None:
    model = build(attention)
    states = [
        module.new_state(3, length, device=torch.device("cpu"), dtype=torch.float32)
        for module in model.attention_modules()
    ]
    elements = [value.numel() for state in states for value in state.values()]
    assert sum(elements) == 3 * model.num_cache_elements(length)
    assert all(value.shape[0] == 3 for state in states for value in state.values())


@each_attention
def test_bf16_stays_bf16_and_is_close_to_fp32(attention: AttentionConfig) -> None:
    model = build(attention)
    ids = tokens(1, 24)
    expected = model(ids)
    outputs = []
    for module in model.attention_modules():
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output.dtype))
    got = model.bfloat16()(ids)
    assert {*outputs} == {torch.bfloat16}
    assert (got - expected).norm() < 0.1 * expected.norm()


@each_attention
def test_blocks_compile_as_has_graph_breaks_says(attention: AttentionConfig) -> None:
    model = build(attention)
    ids, labels = tokens(1, 20), tokens(1, 20, seed=1)
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    expected = model(ids, cu_seqlens=bounds, labels_BT=labels)
    for block, module in zip(model.layers, model.attention_modules(), strict=True):
        block.compile(backend="eager", fullgraph=not module.has_graph_breaks)
    loss = model(ids, cu_seqlens=bounds, labels_BT=labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch._dynamo.reset()


class _Gated(HeadProjections):
    """A gate of the output, the same for forward, prefill and extend."""

    def output(self, o_BTHK: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        return super().output(o_BTHK, x_BTD) * torch.sigmoid(x_BTD.sum(-1, keepdim=True))


def _has_output(attention: AttentionConfig) -> bool:
    with torch.device("meta"):
        return hasattr(
            build_attention(ModelConfig(size="debug", vocab_size=9, attention=attention), 0), "output"
        )


@torch.no_grad()
@pytest.mark.parametrize("attention", filter(_has_output, ATTENTIONS), ids=lambda a: a.kind)
def test_a_gate_of_the_output_has_one_place(attention: AttentionConfig) -> None:
    model = build(attention, torch.float64)
    for module in model.attention_modules():
        module.__class__ = type("Gated", (_Gated, type(module)), {})
    ids = tokens(1, 40)
    expected = model(ids)
    cache = Cache.new(model, 1, 120)
    x_BTD = prefill(model, ids[:, :25], torch.tensor([0, 25], dtype=torch.int32), cache)
    torch.testing.assert_close(model.output(x_BTD, None), expected[:, :25], atol=1e-8, rtol=1e-8)
    x_BTD = extend(model, ids[:, 25:], cache)
    torch.testing.assert_close(model.output(x_BTD, None), expected[:, 25:], atol=1e-8, rtol=1e-8)


def test_a_norm_named_r_norm_is_not_parallax_own() -> None:
    model = Qwen3(ModelConfig(size="tiny", vocab_size=VOCAB, attention=SoftmaxConfig()))
    for module in model.attention_modules():
        module.register_module("r_norm", nn.RMSNorm(TINY.head_dim))
    init_weights(model, 0)
    for module in model.attention_modules():
        assert torch.equal(module.get_parameter("r_norm.weight"), torch.ones(TINY.head_dim))
    for module in build(ParallaxConfig(r_gain_init=0.7)).attention_modules():
        assert torch.all(module.get_parameter("r_norm.weight") == 0.7)
