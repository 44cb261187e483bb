"""Measurements of whole models, of every attention: as dense computations, and without traces."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from eval.diagnostics import collect as collect_module
from eval.diagnostics.collect import LayerDiagnostics, collect, make_record
from eval.diagnostics.record import compact, layer_values, means_of_layers
from eval.diagnostics.sample import draw_queries
from models.attention.key_values import KeyValueAttention
from models.config import (
    AffineLinearConfig,
    AttentionConfig,
    LocalLinearConfig,
    Mamba2Config,
    ModelConfig,
    ParallaxConfig,
    SoftmaxConfig,
)
from models.init import init_weights
from models.qwen3 import Qwen3
from parallax.reference import local_linear_reference, parallax_reference_stats
from tests.eval.diagnostics.batches import make_batch

SEQ_LEN = 32
BATCH = make_batch([20, 9, 50, 30, 2, 40], SEQ_LEN)
SAMPLE = draw_queries(BATCH, SEQ_LEN, num_queries=None)


def build(attention: AttentionConfig) -> Qwen3:
    model = Qwen3(ModelConfig(size="debug", vocab_size=320, attention=attention, init_std=0.2))
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def inputs_of(model: Qwen3) -> list[tuple[Any, ...]]:
    """What every attention module receives in a plain forward."""
    found: list[tuple[Any, ...]] = []
    handles = [m.register_forward_pre_hook(lambda _, a: found.append(a)) for m in model.attention_modules()]
    with torch.no_grad():
        model(SAMPLE.tokens_BT.reshape(1, -1), cu_seqlens=SAMPLE.cu_seqlens, max_seqlen=SEQ_LEN)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "attention",
    [
        ParallaxConfig(),
        ParallaxConfig(window_size=6, r_heads="kv", gate="head"),
        ParallaxConfig(gate="token", r_rank=8, r_norm=False, num_plain_layers=2, rope_on_r=False),
        LocalLinearConfig(ridge=0.5, solver="direct"),
    ],
    ids=["parallax", "window-kv-gate", "low-rank-plain", "lla"],
)
def test_ratios_of_every_layer_are_those_of_a_dense_forward(attention: AttentionConfig) -> None:
    model = build(attention)
    is_solved = isinstance(attention, LocalLinearConfig)
    layers = collect(model, SAMPLE, set="full" if is_solved else "cheap")
    rows, columns = SAMPLE.is_sampled_BN.nonzero(as_tuple=True)
    positions = rows * SEQ_LEN + SAMPLE.query_BN[rows, columns]
    for layer, module, arguments in zip(layers, model.attention_modules(), inputs_of(model), strict=True):
        assert isinstance(module, KeyValueAttention)
        with torch.no_grad():
            q, k, v = (x.double() for x in module.project(arguments[0], arguments[1]))
            r = module.probe(arguments[0], arguments[1])
        options = {"cu_seqlens": SAMPLE.cu_seqlens, "window_size": module.window_size}
        stats = parallax_reference_stats(q, None if r is None else r.double(), k, v, **options)
        o = local_linear_reference(q, k, v, ridge=0.5, **options) if is_solved else stats.o
        if r is None and not is_solved:
            assert not any("correction" in name for name in layer.heads)
            assert layer.attention == "SoftmaxAttention"
            continue
        ratio = ((stats.vbar - o).norm(dim=-1) / stats.vbar.norm(dim=-1))[0, positions]
        assert layer.heads["correction_ratio/mean"] == pytest.approx(ratio.mean(0).tolist(), rel=1e-4)
        assert layer.heads["correction_ratio/median"] == pytest.approx(
            ratio.quantile(0.5, 0).tolist(), rel=1e-4
        )
    if isinstance(attention, ParallaxConfig) and attention.gate is not None:
        module, arguments = list(model.attention_modules())[-1], inputs_of(model)[-1]
        gate = torch.sigmoid(arguments[0][0] @ module.wg.weight.T)[positions].mean(0)  # pyrefly: ignore
        assert layers[-1].heads["gate/mean"] == pytest.approx(gate.tolist(), rel=1e-5)
    if isinstance(attention, ParallaxConfig) and attention.r_rank is not None:
        assert {"wr", "wr_in", "wr_out"} <= {*layers[-1].weights}


@pytest.mark.parametrize("attention", [Mamba2Config(), AffineLinearConfig()])
def test_attention_without_weights_over_keys_has_spectra_alone(attention: AttentionConfig) -> None:
    for kind in ("cheap", "full"):
        layers = collect(build(attention), SAMPLE, set=kind)
        assert len(layers) == 4
        for layer in layers:
            assert not layer.heads
            assert not layer.by_context
            assert all(values["stable_rank"] for values in layer.weights.values())


def test_the_full_set_adds_alignments_and_spectra_of_heads() -> None:
    model = build(ParallaxConfig())
    cheap, full = (collect(model, SAMPLE, set=kind, layers=[1]) for kind in ("cheap", "full"))
    assert [layer.layer for layer in (*cheap, *full)] == [1, 1]
    added = {*full[0].heads} - {*cheap[0].heads}
    assert {"correction_alignment/mean", "probe_alignment/mean", "covariance_alignment/mean"} <= added
    assert {"heads/qk_stable_rank", "heads/rk_stable_rank", "heads/ov_stable_rank"} <= added
    assert all(cheap[0].heads[name] == full[0].heads[name] for name in cheap[0].heads)
    softmax = collect(build(SoftmaxConfig()), SAMPLE, set="full", layers=[0])[0].heads
    assert "key_condition_number/median" in softmax
    assert not any("alignment" in name for name in softmax)


def test_nothing_is_left_behind_in_a_compiled_model_and_nothing_drawn_at_random() -> None:
    model = build(ParallaxConfig())
    for block in model.layers:
        block.compile(backend="eager", fullgraph=True)

    def loss() -> torch.Tensor:
        labels = BATCH.labels
        return model(
            BATCH.inputs["input"], cu_seqlens=BATCH.inputs["cu_seqlens"], max_seqlen=SEQ_LEN, labels_BT=labels
        )

    torch._dynamo.reset()
    before = loss()
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    state = torch.get_rng_state()
    layers = collect(model, SAMPLE, set="cheap")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(layers) == 4
    assert torch.equal(loss(), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    eager = collect(build(ParallaxConfig()), SAMPLE, set="cheap")
    assert layers == eager


@pytest.mark.parametrize("fails", [False, True])
def test_sharded_weights_are_sharded_again(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsharded = collect(build(ParallaxConfig()), SAMPLE, set="cheap")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build(ParallaxConfig())
        mesh = init_device_mesh("cpu", (1,))
        groups: list[Any] = [[model.tok_embeddings, model.norm, model.output], *model.layers, model]
        for group in groups:
            fully_shard(group, mesh=mesh, reshard_after_forward=False)
        if fails:
            monkeypatch.setattr(collect_module, "measure_layer", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                collect(model, SAMPLE, set="cheap")
        else:
            assert collect(model, SAMPLE, set="cheap") == unsharded
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


def test_a_failed_measurement_is_raised_when_the_forward_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(ParallaxConfig())
    ended: list[bool] = []
    model.output.register_forward_hook(lambda *_: ended.append(True))
    monkeypatch.setattr(collect_module, "measure_layer", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(model, SAMPLE, set="cheap")
    assert ended == [True]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_heads_are_reduced_to_layers() -> None:
    layer = LayerDiagnostics(
        layer=3,
        attention="ParallaxAttention",
        heads={
            "entropy/mean": [1.0, None, 3.0],
            "entropy/stderr": [0.1, 0.1, 0.1],
            "largest_logit/max": [5.0, 9.0, 7.0],
            "smallest_weight/min": [-1.0, -3.0, 0.0],
            "first_mass/middle_mean": [None, None, None],
            "first_mass/middle_stderr": [None, None, None],
        },
        by_context={"entropy": {"mean": [1.0, None, None], "stderr": [0.1, None, None]}},
        weights={"wr": {"stable_rank": 7.0, "spectral_norm": None}},
        gains={"r_norm": {"rms": 0.25}},
    )
    record = make_record([layer], SAMPLE, "cheap")
    wanted = {
        "entropy/mean": 2.0,
        "largest_logit/max": 9.0,
        "smallest_weight/min": -3.0,
        "weights/wr/stable_rank": 7.0,
        "gains/r_norm/rms": 0.25,
    }
    assert layer_values(record["layers"][0]) == wanted
    assert means_of_layers(record) == {f"diagnostics/{name}/layer_03": x for name, x in wanted.items()}
    shown = compact(record)
    assert shown["values"] == {3: wanted}
    assert shown["by_context"] == {"entropy": [[1.0, None, None]]}
