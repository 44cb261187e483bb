"""Estimated step times beside measured ones, and how they depend on the run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config import load
from training.dry_run import dry_run
from training.preflight import build_meta_model
from training.run_config import RunConfig
from training.step_time import StepTime, estimate_step_time

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MEASURED = {
    name: json.loads((RESULTS / f"{name}_202611.json").read_text(encoding="utf-8"))["rows"]
    for name in (
        *("training_no_workspace_h200", "training_unmasked_h200", "training_1.7b_h200"),
        *("scaling_0.6b_graphs_h200x4", "scaling_1.7b_h200x4"),
    )
}
STEPS = [
    pytest.param(
        row, ["--training.global_batch_size", str(rows), *words], most, id=f"{Path(row['config']).stem}{note}"
    )
    for name, rows, words, most, note in (
        ("training_no_workspace_h200", 8, [], 1.02, ""),
        # the rate of attention is that of documents; softmax attention has a higher one in whole rows
        ("training_unmasked_h200", 8, ["--data.mask_documents", "false"], 1.08, "-unmasked"),
        ("training_1.7b_h200", 16, [], 1.02, ""),
    )
    for row in MEASURED[name]
    if row["stock_rows"] is None
]
SCALING = MEASURED["scaling_0.6b_graphs_h200x4"] + MEASURED["scaling_1.7b_h200x4"]


def estimate(path: str, world_size: int, overrides: list[str]) -> StepTime:
    config = load(RunConfig, path, overrides)
    time = estimate_step_time(config, build_meta_model(config), world_size)
    assert time is not None
    return time


@pytest.mark.parametrize(("row", "overrides", "most"), STEPS)
def test_estimates_are_close_to_measured_steps(
    row: dict[str, Any], overrides: list[str], most: float
) -> None:
    time = estimate(row["config"], 1, overrides)
    assert 0.92 < time.total / row["step_seconds"] < most


@pytest.mark.parametrize("row", SCALING, ids=lambda row: f"{Path(row['config']).stem}-{row['num_gpus']}")
def test_estimates_are_below_steps_that_were_measured_before(row: dict[str, Any]) -> None:
    keys = {"training.global_batch_size": row["rows"], "parallelism.replicate": row["replicas"]}
    overrides = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    ratio = estimate(row["config"], row["num_gpus"], overrides).total / row["step_seconds"]
    # these steps waited for the host, and had neither the kernel of norm and RoPE nor that of the loss
    assert 0.8 < ratio < 0.95


def test_the_host_bounds_small_micro_batches_without_cuda_graphs() -> None:
    words = ["--training.local_batch_size", "1", "--training.global_batch_size", "8"]
    replayed = estimate("configs/0.6b_softmax_adamw.toml", 8, words)
    launched = estimate("configs/0.6b_softmax_adamw.toml", 8, [*words, "--training.cuda_graphs", "false"])
    assert replayed.launch_bound == 0.0 < launched.launch_bound


def test_one_rank_neither_gathers_weights_nor_scatters_gradients() -> None:
    words = ["--training.global_batch_size", "64"]
    one, two = (estimate("configs/0.6b_softmax_adamw.toml", n, words) for n in (1, 2))
    assert one.communication == 0.0 < two.communication
    # per micro-batch, of which one rank has twice as many
    assert one.memory_bound < 2 * two.memory_bound


def test_more_gpus_cost_more_gpu_hours_and_less_time() -> None:
    layouts = {8: [], 64: ["--parallelism.replicate", "8"], 128: ["--parallelism.replicate", "16"]}
    seconds = [estimate("configs/0.6b_parallax_muon.toml", n, layout).total for n, layout in layouts.items()]
    gpu_seconds = [n * x for n, x in zip(layouts, seconds, strict=True)]
    assert seconds == sorted(seconds, reverse=True)
    assert gpu_seconds == sorted(gpu_seconds)


def test_sharding_over_the_network_is_exposed_where_replicas_are_not() -> None:
    arguments = ["--training.local_batch_size", "1"]
    hsdp = estimate("configs/1.7b_parallax_muon.toml", 512, [*arguments, "--parallelism.replicate", "64"])
    fsdp = estimate("configs/1.7b_parallax_muon.toml", 512, arguments)
    assert fsdp.communication > 2 * hsdp.communication
    assert fsdp.bottleneck == "communication"


def test_whole_rows_cost_more_attention_and_no_waiting() -> None:
    path = "configs/0.6b_softmax_adamw.toml"
    masked, whole = (estimate(path, 8, ["--data.mask_documents", value]) for value in ("true", "false"))
    assert whole.waiting == 0 < masked.waiting
    assert masked.attention < 0.6 * whole.attention
    same = replace(whole, attention=masked.attention, waiting=masked.waiting)
    assert same == masked


WIDE = {"width": 512, "num_layers": 16, "num_heads": 8, "num_kv_heads": 4, "head_dim": 80, "mlp_width": 1920}


@pytest.mark.parametrize(
    ("path", "keys", "said"),
    [
        ("configs/60m_lla_muon.toml", {}, "no estimate for attention.kind lla; state"),
        ("configs/60m_softmax_muon.toml", {"attention.impl": "torch"}, "softmax runs without our kernels"),
        ("configs/60m_parallax_muon.toml", {"attention.impl": "eager"}, "parallax runs without our kernels"),
        (
            "configs/60m_parallax_muon.toml",
            {"size": "custom", **{f"custom_size.{name}": value for name, value in WIDE.items()}},
            "parallax runs without our kernels, by attention.impl or head_dim",
        ),
    ],
    ids=["kind", "torch", "eager", "width"],
)
def test_no_estimate_for_kernels_that_were_not_measured(path: str, keys: dict[str, Any], said: str) -> None:
    words = [word for key, value in keys.items() for word in (f"--model.{key}", str(value))]
    run = load(RunConfig, path, words)
    assert estimate_step_time(run, build_meta_model(run), 1) is None
    assert said in dry_run(run, 1)


def test_a_larger_micro_batch_hides_more_communication() -> None:
    path, layout = "configs/1.7b_parallax_muon.toml", ["--training.global_batch_size", "1024"]
    exposed = []
    for rows in (1, 4, 16):
        num_micro_batches = 1024 // (64 * rows)
        words = [*layout, "--training.local_batch_size", str(rows)]
        exposed.append(estimate(path, 64, words).communication / num_micro_batches)
    # the embedding's weights and gradients come first and last: nothing hides them
    assert exposed[0] > exposed[1] == pytest.approx(exposed[2])
    assert exposed[2] > 0
