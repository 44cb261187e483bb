"""Every config in configs/ passes the dry run, with the parameters and FLOPs counted by hand."""

import re
from pathlib import Path

import pytest

from config import load
from errors import UserError
from models.config import ParallaxConfig
from models.size_table import build_row
from models.sizes import split_size
from optimizers.param_groups import assign_parameters
from tests.project_configs import project_configs
from training.dry_run import dry_run
from training.memory import MemoryEstimate, estimate_memory
from training.preflight import build_meta_model
from training.run_config import RunConfig

CONFIGS = project_configs()

# width, layers, query heads, kv heads, head width, MLP width, vocabulary
DIMENSIONS = {
    "debug": (128, 4, 4, 2, 64, 384, 4096),
    "60m": (512, 16, 8, 4, 64, 1920, 16384),
    "60m_parameter_matched": (512, 16, 12, 4, 64, 1920, 16384),
    "60m_compute_matched": (512, 16, 4, 2, 64, 2264, 16384),
    "60m_half_width": (512, 16, 8, 4, 32, 2264, 16384),
    "60m_compute_parameter_matched": (512, 16, 4, 2, 64, 2088, 16384),
    "60m_parameter_neutral": (512, 16, 8, 4, 64, 1752, 16384),
    "0.6b": (1024, 28, 16, 8, 128, 3072, 151936),
    "0.6b_parameter_matched": (1024, 28, 24, 8, 128, 3072, 151936),
    "0.6b_compute_matched": (1024, 28, 16, 8, 64, 4440, 151936),
    "0.6b_compute_parameter_matched": (1024, 28, 16, 8, 64, 3752, 151936),
    "0.6b_parameter_neutral": (1024, 28, 16, 8, 128, 2392, 151936),
    "1.7b": (2048, 28, 16, 8, 128, 6144, 151936),
    "1.7b_parameter_matched": (2048, 28, 24, 8, 128, 6144, 151936),
    "1.7b_compute_matched": (2048, 28, 16, 8, 64, 7512, 151936),
    "1.7b_compute_parameter_matched": (2048, 28, 16, 8, 64, 6824, 151936),
    "1.7b_parameter_neutral": (2048, 28, 16, 8, 128, 5464, 151936),
}
# in millions: of Qwen3, and of W_R as implied by the paper's matched controls
PUBLISHED = {("0.6b", "softmax"): 596.05, ("1.7b", "softmax"): 1720.57}
PROBES = {"0.6b": 58.72, "1.7b": 117.44}
CHANGES = {
    "softmax": ("cosine_adamw", "annealing_muon", "parameter_matched_muon"),
    "parallax": (
        *("cosine_adamw", "annealing_muon", "compute_matched_muon", "compute_parameter_matched_muon"),
        *("gate_muon", "gate_adamw", "no_rope_on_r_muon", "parameter_neutral_muon"),
    ),
}


def count_by_hand(config: RunConfig) -> tuple[int, float]:
    """Count parameters and training FLOPs per token of softmax attention or Parallax from the dimensions."""
    width, layers, heads, kv_heads, head_dim, mlp_width, vocab = DIMENSIONS[config.model.size]
    attention = config.model.attention
    probe = int(attention.kind == "parallax")
    projections = width * head_dim * (2 * heads + 2 * kv_heads)
    if isinstance(attention, ParallaxConfig):
        rank = attention.r_rank
        full = width * head_dim * heads
        projections += full if rank is None else rank * (width + head_dim * heads)
        if attention.gate is not None:
            projections += width * (heads if attention.gate == "head" else 1)
    matrices = layers * (projections + 3 * width * mlp_width) + vocab * width
    norms = layers * (2 * width + (2 + probe) * head_dim) + width
    products = (10 if probe else 6) * layers * heads * head_dim * 2
    return matrices + norms, 6.0 * matrices + products * (config.training.seq_len + 1) / 2


def read(text: str, name: str) -> float:
    """Return a number that the dry run prints."""
    match = re.search(rf"^{name} +([\d.]+)", text, re.MULTILINE)
    assert match is not None, name
    return float(match.group(1))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_passes_the_dry_run(path: Path) -> None:
    config = load(RunConfig, path)
    text = dry_run(config, 8 if split_size(config.model.size)[0] in ("0.6b", "1.7b") else 1)
    size, attention, *change, optimizer = path.stem.split("_")
    plain, control = split_size(config.model.size)
    assert (plain, config.model.attention.kind) == (size, attention)
    assert control in (None, "_".join(change), attention)
    assert config.optimizer.groups["hidden"].kind == optimizer
    assert (config.schedule.kind == "cosine") == (change == ["cosine"])
    assert (config.optimizer.groups["hidden"].weight_decay_gamma is not None) == (change == ["annealing"])
    if attention in ("softmax", "parallax"):
        parameters, flops = count_by_hand(config)
        assert read(text, "parameters, total") == round(parameters / 1e6, 2)
        assert read(text, "FLOPs per token") == round(flops / 1e9, 3)
    if (config.model.size, attention) in PUBLISHED:
        assert read(text, "parameters, total") == PUBLISHED[config.model.size, attention]
    if attention == "parallax" and config.model.size in PROBES:
        assert read(text, "parameters, w_r") == PROBES[config.model.size]
    assert build_row(config.model.size, config.model.attention).config.vocab_size == config.model.vocab_size


@pytest.mark.parametrize("size", ["60m", "0.6b", "1.7b"])
def test_every_non_recurrent_row_of_the_paper_has_a_config(size: str) -> None:
    names = {path.stem for path in CONFIGS}
    for attention, changes in CHANGES.items():
        assert {f"{size}_{attention}_{change}" for change in changes} <= names
    configs = [load(RunConfig, path) for path in CONFIGS if path.stem.startswith(f"{size}_")]
    plain = {(c.training.steps, c.training.seq_len, c.training.global_batch_size) for c in configs}
    assert plain - {(1500, 1024, 256)} == {(2000, 1024, 256) if size == "60m" else (20000, 4096, 1024)}
    assert {c.schedule.warmup_steps for c in configs} == {100 if size == "60m" else 500}


def test_every_size_has_softmax_and_parallax_with_both_optimizers() -> None:
    names = {path.stem for path in CONFIGS}
    for size in ("debug", "60m", "0.6b", "1.7b"):
        for attention in ("softmax", "parallax"):
            assert {f"{size}_{attention}_{optimizer}" for optimizer in ("muon", "adamw")} <= names


def test_the_batch_of_small_runs_fits_1_to_8_ranks() -> None:
    for path in CONFIGS:
        config = load(RunConfig, path)
        if split_size(config.model.size)[0] in ("debug", "60m"):
            assert [config.gradient_accumulation_steps(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_the_dry_run_raises_the_errors_of_the_run() -> None:
    path = next(p for p in CONFIGS if p.stem == "debug_softmax_muon")
    with pytest.raises(UserError, match="no group matches these parameters"):
        dry_run(load(RunConfig, path, ["--optimizer.groups.vectors.parameters", '["norm.weight"]']), 1)
    with pytest.raises(UserError, match="warmup_steps"):
        dry_run(load(RunConfig, path, ["--training.steps", "3"]), 1)
    with pytest.raises(UserError, match="--world-size must be at least 1"):
        dry_run(load(RunConfig, path), 0)
    with pytest.raises(UserError, match="number of ranks"):
        dry_run(load(RunConfig, path, ["--parallelism.replicate", "3"]), 2)


def test_memory_of_weights_gradients_and_optimizer_by_hand() -> None:
    path = next(p for p in CONFIGS if p.stem == "0.6b_parallax_muon")
    # in fp32: one momentum for Muon, two moments for AdamW
    counts = count_groups(load(RunConfig, path))
    weights, states = (
        4 * sum(counts.values()),
        4 * (counts["hidden"] + 2 * (counts["embedding"] + counts["vectors"])),
    )

    def memory(*words: str, ranks: int = 8) -> MemoryEstimate:
        config = load(RunConfig, path, words)
        return estimate_memory(config, build_meta_model(config), ranks)

    found = memory("--training.local_batch_size", "8")
    assert (found.weights, found.gradients, found.optimizer) == (weights / 8, weights / 8, states / 8)
    # without accumulation gradients take the place of activations that are no longer needed
    assert memory("--training.local_batch_size", "128").gradients == 0.0
    # all blocks, in bf16, stay gathered
    kept = memory("--parallelism.reshard_after_forward", "false")
    assert kept.gathered == weights / 2 > 2 * found.gathered
    # one rank casts one block at a time, and nothing in fp32
    num_layers, embedding = 28, 2 * counts["embedding"]
    alone = memory(ranks=1).gathered
    assert alone - embedding == pytest.approx((weights / 2 - embedding) / num_layers)
    assert found.gathered - embedding == pytest.approx(2 * (alone - embedding))
    assert memory("--parallelism.reshard_after_forward", "false", ranks=1).gathered == kept.gathered
    assert memory("--training.precision", "float32", ranks=1).gathered == 0.0
    # in fp32 a chunk's logits have twice the bytes, and their gradient is beside them
    vocab_size, width = 151_936, 1024
    assert found.loss == 2 * 4096 * vocab_size + 6 * vocab_size * width
    exact = memory("--training.precision", "float32")
    assert exact.loss == 8 * 4096 * vocab_size + 8 * vocab_size * width


def count_groups(config: RunConfig) -> dict[str, int]:
    """Count the parameters of each optimizer group."""
    groups = assign_parameters(build_meta_model(config).named_parameters(), config.optimizer.groups)
    return {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}


def test_memory_falls_with_ranks_and_activation_checkpointing_and_grows_with_the_batch() -> None:
    path = next(p for p in CONFIGS if p.stem == "0.6b_parallax_muon")

    def peak(ranks: int, *words: str) -> float:
        return float(dry_run(load(RunConfig, path, words), ranks).split()[-2])

    plain = peak(8)
    assert plain < peak(1)
    full, selective = (peak(8, "--training.activation_checkpointing", kind) for kind in ("full", "selective"))
    assert full < selective < plain
    assert full < 0.5 * plain
    # half the rows of a micro-batch: less than the whole, more than half of it, since weights stay
    smaller = peak(8, "--training.local_batch_size", "4")
    assert 0.5 * plain < smaller < plain
