"""Every config in configs/ is a run that could start."""

import re
from pathlib import Path

import pytest

import config
from training.dry_run import dry_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_passes_the_dry_run(path: Path) -> None:
    run = config.load(path)
    text = dry_run(run, 8 if run.model.size in ("0.6b", "1.7b") else 1)
    size, attention, *_, optimizer = path.stem.split("_")
    assert (run.model.size, run.model.attention.kind) == (size, attention)
    assert run.optimizer.groups["hidden"].kind == optimizer
    total = float(re.search(r"parameters, total +([\d.]+)M", text).group(1))  # type: ignore[union-attr]
    published = {"0.6b": 596.05, "1.7b": 1720.57}
    if attention == "softmax" and size in published:
        assert total == published[size]


def test_every_size_has_both_attentions_with_both_optimizers() -> None:
    names = {path.stem for path in CONFIGS}
    for size in ("debug", "60m", "0.6b", "1.7b"):
        for attention in ("softmax", "parallax"):
            assert {f"{size}_{attention}_{optimizer}" for optimizer in ("muon", "adamw")} <= names


def test_small_runs_start_on_any_power_of_two_of_gpus() -> None:
    for path in CONFIGS:
        run = config.load(path)
        if run.model.size in ("debug", "60m"):
            assert [run.gradient_accumulation_steps(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_the_dry_run_refuses_what_the_run_would() -> None:
    path = next(p for p in CONFIGS if p.stem == "debug_softmax_muon")
    with pytest.raises(ValueError, match="no group matches these parameters"):
        dry_run(config.load(path, ["--optimizer.groups.vectors.parameters", '["norm.weight"]']), 1)
    with pytest.raises(ValueError, match="warmup_steps"):
        dry_run(config.load(path, ["--training.steps", "3"]), 1)
    with pytest.raises(ValueError, match="--world-size must be at least 1"):
        dry_run(config.load(path), 0)
    with pytest.raises(ValueError, match="number of ranks"):
        dry_run(config.load(path, ["--parallelism.replicate", "3"]), 2)


def test_memory_falls_with_ranks_and_checkpointing_and_grows_with_the_batch() -> None:
    path = next(p for p in CONFIGS if p.stem == "0.6b_parallax_muon")

    def peak(ranks: int, *words: str) -> float:
        return float(dry_run(config.load(path, words), ranks).split()[-2])

    assert peak(8) < peak(1)
    assert peak(8, "--training.activation_checkpointing", "full") < 0.5 * peak(8)
    smaller = peak(8, "--training.local_batch_size", "4")
    assert smaller < peak(8, "--training.activation_checkpointing", "selective") + smaller < 2 * peak(8)
