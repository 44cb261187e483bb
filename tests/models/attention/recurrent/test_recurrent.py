"""The recurrences: equal to fla's and transformers' reference code, chunked equal to token by token."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errors import UnsupportedError, UserError
from models import sizes
from models.attention.base import Attention, Rope
from models.attention.mamba2 import Mamba2
from models.attention.recurrent.base import STATE_SPACE
from models.attention.recurrent.chunks import l2_normalize
from models.attention.recurrent.delta_rule import gated_delta_rule, gated_delta_rule_steps
from models.attention.recurrent.mesa import mesa, mesa_steps
from models.attention.recurrent.state_space import state_space, state_space_steps
from models.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    Mamba2Config,
    MesaNetConfig,
    ModelConfig,
)
from models.init import init_weights
from models.qwen3 import Qwen3

TINY = sizes.ModelSize(width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=48)
BASELINES: list[AttentionConfig] = [
    GatedDeltaNetConfig(),
    KimiDeltaConfig(),
    MesaNetConfig(num_iterations=16),
    Mamba2Config(state_size=12),
]
baselines = pytest.mark.parametrize("attention", BASELINES, ids=lambda a: a.kind)


@pytest.fixture(autouse=True)
def _tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def build(attention: AttentionConfig, dtype: torch.dtype = torch.float32) -> Qwen3:
    model = Qwen3(ModelConfig(size="tiny", vocab_size=53, attention=attention, init_std=0.2))
    init_weights(model, 0)
    return model.to(dtype)


def inputs(
    kind: str, length: int = 150, dtype: torch.dtype = torch.float64, width: int = 8
) -> dict[str, Any]:
    """Inputs of a recurrence by name, two rows and three heads, with decays from weak to strong."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, length, 3, *shape, generator=generator, dtype=dtype)

    values: dict[str, Any] = {
        "q": normal(width),
        "k": normal(width),
        "v": normal(width if kind == "mesa" else 2 * width),
    }
    channels = {"gated-delta": (1,), "kimi-delta": (width,)}.get(kind, ())
    values["g"] = -normal(*channels).exp() * torch.tensor([0.01, 0.3, 3.0], dtype=dtype).reshape(
        3, *(1,) * len(channels)
    )
    if kind != "state-space":
        values["beta"] = normal().sigmoid()
    if kind == "mesa":
        values["ridge"] = torch.rand(3, width, generator=generator, dtype=dtype) + 0.25
        values["num_iterations"] = 30
    return values


CHUNKED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gated-delta": (gated_delta_rule, gated_delta_rule_steps),
    "kimi-delta": (gated_delta_rule, gated_delta_rule_steps),
    "mesa": (mesa, mesa_steps),
    "state-space": (state_space, state_space_steps),
}
kinds = pytest.mark.parametrize("kind", CHUNKED)


def empty_states(kind: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
    state = values["q"].new_zeros(2, 3, values["k"].shape[-1], values["v"].shape[-1])
    return (state, state) if kind == "mesa" else (state,)


def fla_reference(kind: str, values: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    pytest.importorskip("fla")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.kda.naive import naive_recurrent_kda
    from fla.ops.mesa_net.naive import naive_mesa_net_exact
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    q, k, v, g = (values[name] for name in "qkvg")
    if kind == "state-space":
        o, state = naive_recurrent_simple_gla(q, k, v, g, scale=1.0, output_final_state=True)
        return o, (state,)
    q, k, beta = l2_normalize(q), l2_normalize(k), values["beta"]
    if kind == "mesa":
        o, *states = naive_mesa_net_exact(q, k, v, g, values["ridge"], beta)
        return o, tuple(states)
    if kind == "kimi-delta":
        o, state = naive_recurrent_kda(q, k, v, g, beta, output_final_state=True)
    else:
        o, state = naive_recurrent_gated_delta_rule(q, k, v, beta, g.squeeze(-1), output_final_state=True)
    return o, (state,)


@kinds
def test_outputs_states_and_gradients_equal_the_references_of_fla(kind: str) -> None:
    values = {
        name: x.float().requires_grad_() if isinstance(x, Tensor) else x for name, x in inputs(kind).items()
    }
    tensors = [x for x in values.values() if isinstance(x, Tensor)]
    theirs_o, theirs_states = fla_reference(kind, values)
    ours_o, ours_states = CHUNKED[kind][0](*values.values(), cu_seqlens=None)
    for ours, theirs in zip((ours_o, *ours_states), (theirs_o, *theirs_states), strict=True):
        assert (ours - theirs).norm() < 2e-6 * theirs.norm()
    weight = torch.randn(ours_o.shape, generator=torch.Generator().manual_seed(1))
    ours_grads = torch.autograd.grad((ours_o * weight).sum(), tensors)
    theirs_grads = torch.autograd.grad((theirs_o * weight).sum(), tensors)
    for name, ours, theirs in zip(values, ours_grads, theirs_grads, strict=False):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 2e-5, f"{name}: {error}"


@kinds
def test_chunked_equals_token_by_token_in_fp64(kind: str) -> None:
    values = inputs(kind)
    chunked, steps = CHUNKED[kind]
    o, states = chunked(*values.values(), cu_seqlens=None)
    expected_o, expected_states = steps(*values.values(), states=empty_states(kind, values))
    torch.testing.assert_close(o, expected_o, atol=1e-11, rtol=0)
    for ours, expected in zip(states, expected_states, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=0)


@kinds
def test_gradients_over_documents_equal_finite_differences_of_the_steps_of_each(kind: str) -> None:
    values = {
        name: x[:1] if isinstance(x, Tensor) and name != "ridge" else x
        for name, x in inputs(kind, 41).items()
    }
    bounds = [0, 1, 1, 22, 41]
    names = [name for name, x in values.items() if isinstance(x, Tensor)]
    chunked, steps = CHUNKED[kind]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(values["v"].shape, generator=generator, dtype=torch.float64)

    def loss_of_steps(values: dict[str, Any]) -> float:
        loss = 0.0
        for start, stop in pairwise(bounds):
            part = {
                name: x[:, start:stop] if name in names and name != "ridge" else x
                for name, x in values.items()
            }
            if start < stop:
                states = tuple(state[:1] for state in empty_states(kind, values))
                loss += float((steps(*part.values(), states=states)[0] * weight[:, start:stop]).sum())
        return loss

    leaves = {name: x.clone().requires_grad_() if name in names else x for name, x in values.items()}
    o, _ = chunked(*leaves.values(), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    grads = torch.autograd.grad((o * weight).sum(), [leaves[name] for name in names])
    for name, grad in zip(names, grads, strict=True):
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        up, down = (loss_of_steps(values | {name: values[name] + e * direction}) for e in (1e-5, -1e-5))
        assert float((grad * direction).sum()) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-6), name


def test_repeated_keys_without_decay_stay_exact_in_fp32() -> None:
    # the worst case of the chunk's triangular system
    values = inputs("gated-delta", dtype=torch.float32)
    values["k"] = values["k"][:, :1].expand_as(values["k"])
    values["g"], values["beta"] = values["g"] * 0, torch.ones_like(values["beta"])
    o, _ = gated_delta_rule(*values.values(), cu_seqlens=None)
    exact, _ = gated_delta_rule_steps(
        *(x.double() for x in values.values()), states=(empty_states("", values)[0].double(),)
    )
    torch.testing.assert_close(o.double(), exact, atol=1e-4, rtol=0)


def test_gated_delta_rule_equals_qwen3_next() -> None:
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    values = inputs("gated-delta", dtype=torch.float32)
    # with fla installed the reference code is wrapped by a dispatcher to fla's kernels
    theirs, their_state = inspect.unwrap(module.torch_chunk_gated_delta_rule)(
        *(values[name] for name in "qkv"),
        g=values["g"].squeeze(-1),
        beta=values["beta"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    ours, (state,) = gated_delta_rule(*values.values(), cu_seqlens=None)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, their_state, atol=1e-5, rtol=1e-4)


def test_mamba2_equals_the_mixer_of_transformers() -> None:
    mamba2 = pytest.importorskip("transformers.models.mamba2")
    size = replace(TINY, num_heads=8)
    module = Mamba2(Mamba2Config(state_size=12), size, 1e-5)
    config = mamba2.Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=12, expand=2, n_groups=1, chunk_size=16,
        num_hidden_layers=1, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs = mamba2.modeling_mamba2.Mamba2Mixer(config, 0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (*module.parameters(), module.dt_bias):
            parameter.normal_(0.0, 0.3, generator=generator)
        theirs.in_proj.weight.copy_(torch.cat([w.weight for w in _five(module)]))
        convs = (module.v_conv, module.k_conv, module.q_conv)
        theirs.conv1d.weight.copy_(torch.cat([c.weight for c in convs]).unsqueeze(1))
        theirs.conv1d.bias.copy_(torch.cat([c.bias for c in convs if c.bias is not None]))
        theirs.out_proj.weight.copy_(module.wo.weight)
        theirs.norm.weight.copy_(module.o_norm.weight)
        for ours, name in ((module.a_log, "A_log"), (module.dt_bias, "dt_bias"), (module.skip, "D")):
            theirs.get_parameter(name).copy_(ours)
    x = torch.randn(2, 45, 32, generator=generator)
    rope = Rope(torch.arange(45)[None], 8, 1e4)
    ours_o, theirs_o = module(x, rope, None, 45), theirs(x)
    theirs_o = theirs_o[0] if isinstance(theirs_o, tuple) else theirs_o
    torch.testing.assert_close(ours_o, theirs_o, atol=2e-6, rtol=1e-5)


def _five(module: Mamba2) -> list[nn.Linear]:
    return [module.wz, module.wv, module.wk, module.wq, module.wdt]


@baselines
def test_prefill_and_extend_equal_the_full_forward(attention: AttentionConfig) -> None:
    module = build(attention, torch.float64).layers[0].get_submodule("attention")
    assert isinstance(module, Attention)
    length, prompts = 90, (2, 70, 1, 33)
    x = torch.randn(len(prompts), length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rope = Rope(torch.arange(length)[None], 8, 1e4)
    with torch.no_grad():
        whole = module(x, rope, None, length)
        bounds = torch.tensor([0, 2, 72, 73, 106], dtype=torch.int32)
        packed = torch.cat([x[n, :prompt] for n, prompt in enumerate(prompts)])[None]
        state = module.new_state(len(prompts), length, device=x.device, dtype=torch.float32)
        assert {s.dtype for s in state.values()} == {torch.float32}
        elements = sum(s[0].numel() for s in state.values())
        assert elements == module.num_cache_elements(length) == module.num_cache_elements(1)
        state = module.new_state(len(prompts), length, device=x.device, dtype=torch.float64)
        before = {name: s.data_ptr() for name, s in state.items()}
        prefilled = module.prefill(packed, rope, bounds, 70, state)
        expected = torch.cat([whole[n, :prompt] for n, prompt in enumerate(prompts)])[None]
        torch.testing.assert_close(prefilled, expected, atol=1e-10, rtol=0)
        lengths = torch.tensor(prompts, dtype=torch.int32)
        for num_new in (1, 1, 5, 2):
            rows = [slice(int(n), int(n) + num_new) for n in lengths]
            new = torch.stack([x[n, row] for n, row in enumerate(rows)])
            expected = torch.stack([whole[n, row] for n, row in enumerate(rows)])
            torch.testing.assert_close(module.extend(new, rope, state, lengths), expected, atol=1e-10, rtol=0)
            lengths += num_new
    assert before == {name: s.data_ptr() for name, s in state.items()}


@baselines
def test_optimizer_steps_lower_the_loss_in_fp32_and_bf16(attention: AttentionConfig) -> None:
    ids = torch.randint(0, 53, (1, 61), generator=torch.Generator().manual_seed(4))
    bounds = torch.tensor([0, 17, 60], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        model = build(attention, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(3):
            loss = model(ids[:, :-1], cu_seqlens=bounds, labels_BT=ids[:, 1:])
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[2] < losses[1] < losses[0], losses


@baselines
def test_initial_gates_are_reproducible_and_in_their_ranges(attention: AttentionConfig) -> None:
    first, again = build(attention), build(attention)
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    own = dict(first.layers[0].get_submodule("attention").named_parameters())
    other = dict(first.layers[1].get_submodule("attention").named_parameters())
    assert 0 < own["q_conv.weight"].abs().max() <= 0.5
    assert not torch.equal(own["q_conv.weight"], other["q_conv.weight"])
    for name, parameter in own.items():
        if name.endswith(".bias") and "_conv" not in name:
            assert not parameter.any()
    if "dt_bias" in own:
        step = nn.functional.softplus(own["dt_bias"])
        assert bool(((step > 0.999e-3) & (step < 0.1001)).all())
        assert own["a_log"].exp().max() <= 16.001
        assert not torch.equal(own["a_log"], other["a_log"])
    else:
        ridge = nn.functional.softplus(own["ridge"]) + 0.25
        torch.testing.assert_close(ridge, torch.ones_like(ridge))


def test_flops_by_hand() -> None:
    length, heads, width = 10, 2, 8
    seen = sum(range(1, length + 1)) / length

    def flops(attention: AttentionConfig) -> float:
        module = build(attention).layers[0].get_submodule("attention")
        assert isinstance(module, Attention)
        linear = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        assert module.projection_flops_per_token() == 6 * linear
        return module.product_flops_per_token(length)

    by_value = {1: 3 * width * width + seen * 5 * width, 2: 3 * width * 16 + seen * (3 * width + 2 * 16)}
    assert flops(GatedDeltaNetConfig()) == pytest.approx(6 * heads * by_value[2])
    assert flops(GatedDeltaNetConfig(expand_v=1)) == pytest.approx(6 * heads * by_value[1])
    assert flops(KimiDeltaConfig()) == pytest.approx(6 * heads * by_value[1])
    assert flops(Mamba2Config(state_size=12)) == pytest.approx(
        6 * heads * (2 * 12 * width + seen * (12 + width))
    )
    product = width * width + 2 * width * seen
    assert flops(MesaNetConfig(num_iterations=3)) == pytest.approx(
        2 * heads * ((2 * 3 + 5) * product + 6 * width * width)
    )


def test_kernels_without_fla_or_in_fp64_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.modules.causal_conv1d", None)
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[baselines\]'"):
        STATE_SPACE.fused(q, q, q, q[..., 0], cu_seqlens=None, output_final_state=False)
    with pytest.raises(UnsupportedError, match="use the CPU"):
        STATE_SPACE.fused(
            *(x.double() for x in (q, q, q, q[..., 0])), cu_seqlens=None, output_final_state=False
        )


def test_invalid_options_raise() -> None:
    with pytest.raises(UserError, match=r"expand_v must be at least 1 .* got 0"):
        GatedDeltaNetConfig(expand_v=0)
    with pytest.raises(UserError, match=r"num_iterations must be at least 1 .* got 0"):
        MesaNetConfig(num_iterations=0)
    with pytest.raises(UserError, match=r"state_size must be at least 1 .* got 0"):
        Mamba2Config(state_size=0)


def test_a_second_derivative_of_the_solver_raises() -> None:
    values = inputs("mesa", 20)
    values["q"].requires_grad_()
    o, _ = mesa(*values.values(), cu_seqlens=None)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(o.sum(), values["q"], create_graph=True)
