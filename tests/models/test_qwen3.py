"""The decoder: equal to Hugging Face's, packed documents to separate rows, Parallax to softmax."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from errors import UserError
from models import sizes
from models.attention.base import Attention, Rope, mean_visible_keys
from models.attention.parallax import ParallaxAttention
from models.attention.torch_softmax import torch_softmax_attention
from models.config import (
    MIN_RIDGE,
    AffineLinearConfig,
    AffineMesaNetConfig,
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    LinearConfig,
    LocalLinearConfig,
    Mamba2Config,
    MesaNetConfig,
    ModelConfig,
    ParallaxConfig,
    SoftmaxConfig,
    ValueAverageConfig,
)
from models.convert.format import to_hugging_face
from models.init import init_weights
from models.qwen3 import Qwen3
from parallax import affine_mesanet, local_linear_attention

VOCAB = 97
TINY = sizes.ModelSize(width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=80)


@pytest.fixture(autouse=True)
def _tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def build(
    attention: AttentionConfig, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any
) -> Qwen3:
    model = Qwen3(ModelConfig(size="tiny", vocab_size=VOCAB, attention=attention, init_std=0.2, **options))
    init_weights(model, seed)
    return model.to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_logits_and_gradients_equal_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    model = build(SoftmaxConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=TINY.width,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads,
        num_key_value_heads=TINY.num_kv_heads,
        head_dim=TINY.head_dim,
        intermediate_size=TINY.mlp_width,
        rms_norm_eps=model.config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    theirs = transformers.Qwen3ForCausalLM(config)
    missing = theirs.load_state_dict(to_hugging_face(model.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    ids = tokens(2, 23)
    ours_logits, their_logits = model(ids), theirs(ids).logits
    torch.testing.assert_close(ours_logits, their_logits, atol=1e-5, rtol=1e-5)
    weight = torch.randn(ours_logits.shape, generator=torch.Generator().manual_seed(3))
    (ours_logits * weight).mean().backward()
    (their_logits * weight).mean().backward()
    grads = to_hugging_face({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("window_size", [None, 5])
def test_parallax_with_zero_probe_gain_equals_softmax(
    dtype: torch.dtype, tolerance: float, window_size: int | None
) -> None:
    parallax = build(ParallaxConfig(r_gain_init=0.0, window_size=window_size), dtype)
    softmax = build(SoftmaxConfig(window_size=window_size), dtype)
    ids = tokens(2, 40)
    torch.testing.assert_close(parallax(ids), softmax(ids), atol=tolerance, rtol=0)
    # with a gain the correction is not zero
    other = build(ParallaxConfig(r_gain_init=0.25, window_size=window_size), dtype)
    assert (other(ids) - softmax(ids)).abs().max() > 100 * tolerance


VARIANTS: list[AttentionConfig] = [
    SoftmaxConfig(),
    SoftmaxConfig(window_size=6),
    ParallaxConfig(),
    ParallaxConfig(r_norm=False, rope_on_r=False, window_size=6),
    ParallaxConfig(gate="token"),
    ParallaxConfig(gate="head"),
    ParallaxConfig(r_heads="kv", r_rank=8, gate="head", r_scale=0.5),
    ParallaxConfig(num_plain_layers=1, window_size=6),
    LocalLinearConfig(ridge=0.5),
    LocalLinearConfig(solver="direct", window_size=6),
    ValueAverageConfig(),
    LinearConfig(),
    AffineLinearConfig(),
    AffineMesaNetConfig(ridge=0.5),
    GatedDeltaNetConfig(),
    KimiDeltaConfig(),
    MesaNetConfig(num_iterations=20),
    Mamba2Config(state_size=8),
]
# every kind there is: one without an entry above joins with its defaults
ATTENTIONS = [*VARIANTS, *(kind() for kind in get_args(AttentionConfig) if kind not in map(type, VARIANTS))]
each_attention = pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda a: str(a).split("(", 1)[1][:60])


@each_attention
def test_packed_documents_equal_separate_rows(attention: AttentionConfig) -> None:
    model = build(attention, torch.float64)
    lengths = [1, 7, 20, 12]
    ids = tokens(1, sum(lengths))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = model(ids, cu_seqlens=bounds, max_seqlen=20)
    separate = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-10, rtol=0)


@each_attention
def test_attention_is_causal(attention: AttentionConfig) -> None:
    model = build(attention)
    ids = tokens(1, 30)
    changed = ids.clone()
    changed[0, 17] = (changed[0, 17] + 1) % VOCAB
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :17], after[:, :17], atol=0, rtol=0)
    assert (before[:, 17] - after[:, 17]).abs().max() > 0


@each_attention
def test_gradients_equal_finite_differences(attention: AttentionConfig) -> None:
    model = build(attention, torch.float64)
    ids, labels = tokens(1, 12), tokens(1, 12, seed=1)
    model(ids, labels_BT=labels).backward()
    for name, parameter in model.named_parameters():
        direction = torch.randn(
            parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
        )
        with torch.no_grad():
            losses = []
            for step in (2e-6, -4e-6):
                parameter += step * direction
                losses.append(model(ids, labels_BT=labels))
            parameter += 2e-6 * direction
        assert parameter.grad is not None, name
        expected = (losses[0] - losses[1]) / 4e-6
        torch.testing.assert_close(
            (parameter.grad * direction).sum(), expected, rtol=1e-5, atol=1e-6, msg=name
        )


def test_blockwise_masks_equal_one_dense_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 50, h, 16, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    bounds = torch.tensor([0, 3, 3, 20, 41, 50], dtype=torch.int32)
    ids = torch.bucketize(torch.arange(50), bounds, right=True)
    distance = torch.arange(50).unsqueeze(1) - torch.arange(50)
    mask = (ids.unsqueeze(1) == ids) & (distance >= 0) & (distance < 9)
    dense = nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    for longest in (21, 30, 50):
        out = torch_softmax_attention(q, k, v, bounds, longest, 9)
        torch.testing.assert_close(out, dense, atol=1e-12, rtol=0)


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    for size, total, with_probe in (("0.6b", 596.05, 654.77), ("1.7b", 1720.57, 1838.02)):
        for attention, expected in ((SoftmaxConfig(), total), (ParallaxConfig(), with_probe)):
            with torch.device("meta"):
                model = Qwen3(ModelConfig(size=size, vocab_size=151936, attention=attention))
            assert round(model.num_parameters()["total"] / 1e6, 2) == expected
    with torch.device("meta"):
        counts = Qwen3(ModelConfig(size="60m", vocab_size=16384)).num_parameters()
    assert 58e6 < counts["total"] - counts["embedding"] < 62e6
    assert counts["total"] == sum(counts[part] for part in ("embedding", "attention", "mlp", "norms"))


def test_flops_of_softmax_and_parallax_by_hand() -> None:
    length, width, heads, kv = 10, 48, 4 * 16, 2 * 16
    projections = width * heads * 2 + width * kv * 2
    shared = 6 * (3 * (projections + 3 * width * 80) + VOCAB * width)
    pairs = sum(range(1, length + 1)) / length
    softmax, parallax = build(SoftmaxConfig()), build(ParallaxConfig())
    assert softmax.num_flops_per_token(length) == pytest.approx(shared + 3 * 6 * 2 * heads * pairs)
    assert parallax.num_flops_per_token(length) == pytest.approx(
        shared + 3 * (6 * width * heads + 10 * 2 * heads * pairs)
    )
    assert mean_visible_keys(10, 3) == pytest.approx((1 + 2 + 3 * 8) / 10)


@pytest.mark.parametrize("attention", [SoftmaxConfig(window_size=7), ParallaxConfig(), GatedDeltaNetConfig()])
def test_flops_of_documents_of_every_length(attention: AttentionConfig) -> None:
    model = build(attention)
    flops = model.document_flops(80)
    assert flops.tolist() == [n * model.num_flops_per_token(n) if n else 0 for n in range(81)]


def test_flops_and_cache_of_linear_variants_by_hand() -> None:
    length, width, heads, kv, head = 10, 48, 4 * 16, 2 * 16, 16
    pairs = sum(range(1, length + 1)) / length

    def flops(attention: AttentionConfig) -> float:
        module = build(attention).layers[0].get_submodule("attention")
        assert isinstance(module, Attention)
        return module.projection_flops_per_token() + module.product_flops_per_token(length)

    projections = 6 * width * (2 * heads + 2 * kv)
    product = 2 * heads * pairs
    causal = 2 * (heads + kv) * head + 2 * product
    assert flops(LocalLinearConfig(num_iterations=3)) == pytest.approx(projections + (15 + 4 * 3) * product)
    assert flops(LocalLinearConfig(solver="direct")) == pytest.approx(projections + (15 + head) * product)
    assert flops(ValueAverageConfig()) == 6 * width * 2 * kv
    assert flops(LinearConfig()) == flops(AffineLinearConfig()) == pytest.approx(projections + 3 * causal)
    assert flops(AffineMesaNetConfig(num_iterations=3)) == pytest.approx(projections + (2 * 3 + 5) * causal)

    def cached(attention: AttentionConfig) -> int:
        return build(attention).num_cache_elements(1000) // TINY.num_layers

    assert cached(LocalLinearConfig()) == 2 * kv * 1000
    assert cached(LocalLinearConfig(window_size=7)) == 2 * kv * 7
    assert cached(ValueAverageConfig()) == kv
    assert cached(LinearConfig()) == kv * head
    assert cached(AffineLinearConfig()) == kv * head + 2 * kv
    assert cached(AffineMesaNetConfig()) == 2 * kv * head + 2 * kv


def test_linear_variants_have_the_parameters_of_softmax() -> None:
    softmax = build(SoftmaxConfig()).num_parameters()
    for attention in (LocalLinearConfig(), LinearConfig(), AffineLinearConfig(), AffineMesaNetConfig()):
        assert build(attention).num_parameters() == softmax


def test_invalid_solver_options_raise() -> None:
    for kind in (LocalLinearConfig, AffineMesaNetConfig):
        with pytest.raises(UserError, match=rf"ridge must be at least {MIN_RIDGE} .* got 0.0"):
            kind(ridge=0.0)
        with pytest.raises(UserError, match=r"num_iterations must be at least 1 .* got 0"):
            kind(num_iterations=0)
    with pytest.raises(UserError, match="window_size must be at least 1"):
        LocalLinearConfig(window_size=0)


@pytest.mark.parametrize("width", [64, 128])
def test_the_smallest_ridge_is_solved_to_some_percent(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 60, 1, width, generator=generator).unbind()
    exact = local_linear_attention(q.double(), k.double(), v.double(), ridge=MIN_RIDGE, solver="direct")
    num_iterations = LocalLinearConfig().num_iterations
    o = local_linear_attention(q, k, v, ridge=MIN_RIDGE, num_iterations=num_iterations)
    assert (o - exact).norm() < 0.05 * exact.norm()
    exact = affine_mesanet(q.double(), k.double(), v.double(), ridge=MIN_RIDGE, num_iterations=1000)
    num_iterations = AffineMesaNetConfig().num_iterations
    o = affine_mesanet(q, k, v, ridge=MIN_RIDGE, num_iterations=num_iterations)
    assert (o - exact).norm() < 0.05 * exact.norm()


def test_initial_loss_is_the_log_of_the_vocabulary_size() -> None:
    model = Qwen3(ModelConfig(size="tiny", vocab_size=VOCAB, attention=ParallaxConfig()))
    init_weights(model, 0)
    loss = model(tokens(4, 64), labels_BT=tokens(4, 64, seed=1)) / 256
    assert float(loss.detach()) == pytest.approx(math.log(VOCAB), abs=0.1)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    first, again, other = (build(ParallaxConfig(), seed=s) for s in (1, 1, 2))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name
    attention = first.layers[0].attention
    assert isinstance(attention, ParallaxAttention)
    assert not torch.equal(attention.wq.weight, attention.wr.weight)
    assert float(attention.wr.weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    assert torch.all(attention.r_norm.weight == 0.25)


def test_far_positions_are_rotated_by_their_own_angles() -> None:
    rope = Rope(torch.tensor([[1000, 1001, 40001]]), 8, 1e4)
    exponents = torch.arange(4, dtype=torch.float64) / 4
    angles = torch.tensor([1000.0, 1001.0, 40001.0], dtype=torch.float64)[:, None] * 1e4**-exponents
    torch.testing.assert_close(rope.cos[0, :, 0].double(), angles.cos(), rtol=0, atol=5e-3)
    torch.testing.assert_close(rope.sin[0, :, 0].double(), angles.sin(), rtol=0, atol=5e-3)


@torch.no_grad()
def test_the_probe_is_normalized_scaled_and_then_rotated() -> None:
    model = build(ParallaxConfig(r_scale=0.5), torch.float64)
    attention = model.layers[0].attention
    assert isinstance(attention, ParallaxAttention)
    generator = torch.Generator().manual_seed(4)
    # with gains that differ between channels, norm and rotation do not commute
    gain = torch.rand(attention.r_norm.weight.shape, generator=generator, dtype=torch.float64) + 0.5
    attention.r_norm.weight.copy_(gain)
    x = torch.randn(1, 9, TINY.width, generator=generator, dtype=torch.float64)
    r = attention.wr(x).unflatten(-1, (TINY.num_heads, TINY.head_dim))
    r = 0.5 * gain * r / (r.square().mean(-1, keepdim=True) + attention.r_norm.eps).sqrt()
    half = TINY.head_dim // 2
    angles = torch.arange(9.0)[:, None] * 1e6 ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    turned = torch.complex(r[..., :half], r[..., half:]) * turn
    expected = torch.cat((turned.real, turned.imag), -1)
    rope = Rope(torch.arange(9)[None], TINY.head_dim, 1e6)
    torch.testing.assert_close(attention.probe(x, rope), expected, rtol=1e-5, atol=1e-6)


def test_matrices_that_write_to_the_residual_stream_start_smaller() -> None:
    model = build(ParallaxConfig())
    init_weights(model, 0)
    expected = {"wo": 0.2 / (2 * model.config.dimensions.num_layers) ** 0.5}
    expected |= {"down": expected["wo"], "wq": 0.2, "wr": 0.2, "up": 0.2, "tok_embeddings": 0.2}
    for part, std in expected.items():
        weights = [w for name, w in model.named_parameters() if name.endswith(f"{part}.weight")]
        pooled = torch.cat([w.detach().flatten() for w in weights])
        assert float(pooled.std()) == pytest.approx(std, rel=0.05), part


def test_wrappers_of_activation_checkpointing_are_not_in_parameter_names() -> None:
    plain, wrapped = build(ParallaxConfig()), build(ParallaxConfig())
    for index, block in enumerate(wrapped.layers):
        wrapped.layers[index] = checkpoint_wrapper(block)
    assert [*wrapped.unwrapped_parameters()] == [name for name, _ in plain.named_parameters()]
    init_weights(wrapped, 1)
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_materialize_keeps_embedding_and_head_tied() -> None:
    for tie in (True, False):
        with torch.device("meta"):
            model = Qwen3(ModelConfig(size="tiny", vocab_size=VOCAB, tie_embeddings=tie))
        model.materialize("cpu")
        assert not model.norm.weight.is_meta
        assert (model.output.weight is model.tok_embeddings.weight) == tie


def test_logits_are_at_least_fp32_whatever_the_dtype_and_autocast() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = build(SoftmaxConfig(), dtype)
        assert model(tokens(2, 5)).dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(3, TINY.width)
    head = build(SoftmaxConfig(), torch.bfloat16).output
    assert torch.equal(head.logits(x), head.logits(x.bfloat16()))
    expected = build(SoftmaxConfig()).output.logits(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(build(SoftmaxConfig()).output(x, None), expected)


def test_invalid_dimensions_and_inputs_raise() -> None:
    for size, message in (
        (replace(TINY, num_kv_heads=3), r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        (replace(TINY, head_dim=15), "head_dim must be even for RoPE, got 15"),
    ):
        with pytest.raises(UserError, match=f"^model.custom_size.{message}"):
            Qwen3(ModelConfig(size="custom", custom_size=size, vocab_size=VOCAB))
    model = build(SoftmaxConfig())
    with pytest.raises(UserError, match="at least one token"):
        model(tokens(1, 0))
    with pytest.raises(ValueError, match="cu_seqlens needs batch 1"):
        model(tokens(2, 4), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    for bounds, match in (([0, 3], "ends at 3"), ([1, 4], "starts at 1"), ([0, 3, 2, 4], "decreases")):
        with pytest.raises(ValueError, match=match):
            model(tokens(1, 4), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
