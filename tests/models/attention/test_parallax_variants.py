"""The options of Parallax: equivalences, parameters and FLOPs, errors."""

from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from errors import UserError
from models import sizes
from models.attention.base import Rope
from models.attention.parallax import ParallaxAttention
from models.attention.softmax import SoftmaxAttention
from models.config import AttentionConfig, ModelConfig, ParallaxConfig, SoftmaxConfig
from models.init import init_weights
from models.kernels import norm_rope
from models.qwen3 import Qwen3

VOCAB = 97
TINY = sizes.ModelSize(width=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=160)
W_R = TINY.width * TINY.num_heads * TINY.head_dim


@pytest.fixture(autouse=True)
def _tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def build(attention: AttentionConfig, dtype: torch.dtype = torch.float64) -> Qwen3:
    model = Qwen3(ModelConfig(size="tiny", vocab_size=VOCAB, attention=attention, init_std=0.2))
    init_weights(model, 1)
    return model.to(dtype)


def probe_module(model: Qwen3, layer: int = -1) -> ParallaxAttention:
    attention = model.layers[layer].get_submodule("attention")
    assert isinstance(attention, ParallaxAttention)
    return attention


def tokens(length: int = 30) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


def hidden(length: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, length, TINY.width, dtype=torch.float64, generator=generator)


def rope(first: int = 0, length: int = 5) -> Rope:
    return Rope(torch.arange(first, first + length).unsqueeze(0), TINY.head_dim, 1e4)


def assert_equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def num_extra_parameters(attention: AttentionConfig) -> int:
    """Parameters above those of softmax attention."""
    totals = [build(a).num_parameters()["total"] for a in (attention, SoftmaxConfig())]
    return totals[0] - totals[1]


@pytest.mark.parametrize("gain", [0.0, 0.25, 1.0])
def test_the_gain_starts_at_r_gain_init_and_has_a_gradient(gain: float) -> None:
    model = build(ParallaxConfig(r_gain_init=gain))
    model(tokens(), labels_BT=tokens()).backward()
    attention = probe_module(model)
    assert torch.all(attention.r_norm.weight == gain)
    assert attention.r_norm.weight.grad is not None
    assert attention.wr.weight.grad is not None
    assert 0 < attention.r_norm.weight.grad.abs().max() < float("inf")
    assert bool(attention.wr.weight.grad.abs().max() > 0) == (gain > 0)


def test_r_scale_multiplies_the_gain_and_its_gradient() -> None:
    scaled, plain = build(ParallaxConfig(r_gain_init=0.5, r_scale=0.5)), build(ParallaxConfig())
    assert_equal(scaled(tokens()), plain(tokens()))
    for model in (scaled, plain):
        model(tokens(), labels_BT=tokens()).backward()
    grads = [probe_module(model).r_norm.weight.grad for model in (scaled, plain)]
    assert grads[0] is not None
    assert grads[1] is not None
    assert_equal(grads[0], 0.5 * grads[1])
    assert_equal(build(ParallaxConfig(r_scale=0.0))(tokens()), build(SoftmaxConfig())(tokens()))


@pytest.mark.parametrize("r_norm", [True, False])
def test_only_without_the_norm_the_probe_scales_with_w_r(r_norm: bool) -> None:
    config = ParallaxConfig(r_norm=r_norm)
    attention = probe_module(build(config))
    before = attention.probe(hidden(), rope())
    with torch.no_grad():
        attention.wr.weight *= 2
    expected = before if r_norm else 2 * before
    torch.testing.assert_close(attention.probe(hidden(), rope()), expected, rtol=1e-3, atol=1e-5)
    assert num_extra_parameters(config) == 3 * (W_R + (TINY.head_dim if r_norm else 0))


@pytest.mark.parametrize("rope_on_r", [True, False])
def test_only_without_rope_the_probe_is_independent_of_its_position(rope_on_r: bool) -> None:
    attention = probe_module(build(ParallaxConfig(rope_on_r=rope_on_r)))
    here, there = attention.probe(hidden(), rope(0)), attention.probe(hidden(), rope(7))
    assert torch.equal(here, there) != rope_on_r
    torch.testing.assert_close(here.norm(dim=-1), there.norm(dim=-1), rtol=1e-6, atol=0)  # fp32 tables


def test_plain_layers_equal_softmax_layers() -> None:
    variant, softmax = build(ParallaxConfig(num_plain_layers=2)), build(SoftmaxConfig())
    outputs: dict[str, list[Tensor]] = {"variant": [], "softmax": []}
    for name, model in (("variant", variant), ("softmax", softmax)):
        for layer in model.layers:
            layer.register_forward_hook(lambda m, i, out, name=name: outputs[name].append(out))
        model(tokens())
    equal = [torch.equal(a, b) for a, b in zip(*outputs.values(), strict=True)]
    assert equal == [True, True, False]
    assert isinstance(variant.layers[1].get_submodule("attention"), SoftmaxAttention)
    assert num_extra_parameters(variant.config.attention) == W_R + TINY.head_dim
    assert variant.num_parameters()["w_r"] == W_R
    full = build(ParallaxConfig())
    for seq_len in (7, 64):
        costs = [m.num_flops_per_token(seq_len) for m in (variant, softmax, full)]
        assert costs[0] - costs[1] == pytest.approx((costs[2] - costs[1]) / 3)
    saved = [m.num_saved_elements_per_token() for m in (variant, softmax, full)]
    assert saved[0] == [*saved[1][:2], saved[2][2]]


def test_plain_layers_have_the_window_of_the_others() -> None:
    # with one visible key the correction is zero: all three are the same function
    configs = (
        ParallaxConfig(num_plain_layers=1, window_size=1),
        ParallaxConfig(window_size=1),
        SoftmaxConfig(window_size=1),
    )
    first, second, third = (build(config)(tokens()) for config in configs)
    assert_equal(first, third)
    assert_equal(second, third)
    assert not torch.equal(build(SoftmaxConfig())(tokens()), third)
    assert_equal(build(ParallaxConfig(window_size=30))(tokens()), build(ParallaxConfig())(tokens()))


@pytest.mark.parametrize(("gate", "num_gates"), [("token", 1), ("head", TINY.num_heads)])
def test_a_gate_scales_the_probe(gate: str, num_gates: int) -> None:
    gated, half = build(ParallaxConfig(gate=gate)), build(ParallaxConfig(r_scale=0.5))  # type: ignore[arg-type]
    ratio = probe_module(gated).probe(hidden(), rope()) / (2 * probe_module(half).probe(hidden(), rope()))
    assert 0 < ratio.min() < ratio.max() < 1
    assert ratio.std(dim=-1).max() < 1e-10
    assert (ratio.std(dim=2).max() < 1e-10) == (gate == "token")
    with torch.no_grad():
        for layer in range(TINY.num_layers):
            probe_module(gated, layer).wg.weight.zero_()
    assert_equal(gated(tokens()), half(tokens()))
    extra = [num_extra_parameters(m.config.attention) for m in (gated, half)]
    assert extra[0] - extra[1] == 3 * TINY.width * num_gates


def test_a_probe_per_kv_head_equals_a_w_r_with_repeated_heads() -> None:
    shared, full = build(ParallaxConfig(r_heads="kv")), build(ParallaxConfig())
    for layer in range(TINY.num_layers):
        heads = probe_module(shared, layer).wr.weight.detach().unflatten(0, (-1, TINY.head_dim))
        with torch.no_grad():
            probe_module(full, layer).wr.weight.copy_(heads.repeat_interleave(2, dim=0).flatten(0, 1))
    assert_equal(shared(tokens()), full(tokens()))
    assert num_extra_parameters(shared.config.attention) == 3 * (W_R // 2 + TINY.head_dim)


def test_low_rank_w_r_equals_the_product_of_its_factors() -> None:
    low, full = build(ParallaxConfig(r_rank=16)), build(ParallaxConfig())
    for layer in range(TINY.num_layers):
        factors = probe_module(low, layer)
        with torch.no_grad():
            probe_module(full, layer).wr.weight.copy_(factors.wr_out.weight @ factors.wr_in.weight)
    assert_equal(low(tokens()), full(tokens()))
    assert float(probe_module(full).wr.weight.detach().std()) == pytest.approx(0.2, rel=0.15)
    num_factors = 3 * 16 * (TINY.width + TINY.num_heads * TINY.head_dim)
    assert low.num_parameters()["w_r"] == num_factors
    assert num_extra_parameters(low.config.attention) == num_factors + 3 * TINY.head_dim
    saved_flops = full.num_flops_per_token(9) - low.num_flops_per_token(9)
    assert saved_flops == pytest.approx(6 * (3 * W_R - num_factors))


def measure_saved(attention: AttentionConfig) -> float:
    """Elements per token that a compiled block saves for its backward, without its input and weights."""
    torch.compiler.reset()
    block, num_tokens = build(attention, torch.float32).layers[0], 64
    angles = rope(0, num_tokens)
    x = torch.randn(1, num_tokens, TINY.width, requires_grad=True)
    known = {t.data_ptr() for t in (*block.parameters(), angles.cos, angles.sin, x)}
    sizes_by_storage: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            sizes_by_storage[t.untyped_storage().data_ptr()] = t.numel()
        return t

    compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = compiled(x, angles, None, num_tokens)
    del output
    return sum(sizes_by_storage.values()) / num_tokens


def test_saved_elements_equal_those_saved_by_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU, norm and RoPE are an operator that the compiler does not look into; only sizes matter here
    monkeypatch.setattr(norm_rope, "serves", lambda x: True)
    monkeypatch.setattr(norm_rope, "norm_rope_forward_kernel", MagicMock())
    counted = build(ParallaxConfig()).num_saved_elements_per_token()[0]
    saved = measure_saved(ParallaxConfig())
    for variant in (
        ParallaxConfig(r_norm=False),
        ParallaxConfig(r_norm=False, rope_on_r=False),
        ParallaxConfig(rope_on_r=False, r_scale=0.5),
        ParallaxConfig(gate="head"),
        ParallaxConfig(gate="head", rope_on_r=False),
        ParallaxConfig(gate="token", r_norm=False),
        ParallaxConfig(r_heads="kv", gate="head"),
        ParallaxConfig(r_heads="kv", r_norm=False),
        ParallaxConfig(r_rank=24),
    ):
        difference = build(variant).num_saved_elements_per_token()[0] - counted
        # the reciprocal RMS of the block's norms is not counted
        assert measure_saved(variant) - saved == pytest.approx(difference, abs=TINY.num_heads), variant


def test_a_window_limits_the_cache() -> None:
    per_token = 2 * TINY.num_kv_heads * TINY.head_dim * TINY.num_layers
    for config in (SoftmaxConfig, ParallaxConfig):
        assert build(config()).num_cache_elements(50) == 50 * per_token
        assert build(config(window_size=6)).num_cache_elements(50) == 6 * per_token
        assert build(config(window_size=6)).num_cache_elements(4) == 4 * per_token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_rank": 0}, 'r_rank must be at least 1 .*, or "none"; got 0'),
        ({"r_rank": 96}, r"r_rank must be below 96, the full rank of W_R, got 96; set \"none\""),
        ({"r_rank": 64, "r_heads": "kv"}, "r_rank must be below 64"),
        ({"num_plain_layers": -1}, "num_plain_layers must be at least 0 .* got -1"),
        ({"num_plain_layers": 3}, 'below the 3 layers .* got 3; .* attention.kind to "softmax"'),
        ({"r_scale": float("nan")}, "r_scale must be .* got nan"),
        ({"r_gain_init": float("inf")}, "r_gain_init must be .* got inf"),
        ({"r_norm": False, "r_gain_init": 3.0}, "r_gain_init is 3.0, .* set it to 0.25, or r_norm to true"),
    ],
)
def test_invalid_options_raise(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(ParallaxConfig(**options))
