"""`benchmarks.plain_path`: the differences it prints, and its program without kernels."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import plain_path
from benchmarks.plain_trainer import PLAIN_OVERRIDES, replace_kernels
from config import load
from models.kernels import cross_entropy, norm_rope
from training.run_config import RunConfig


def test_differences_are_those_to_fp32() -> None:
    found = plain_path.differences(
        {
            "kernels": [1.0, 2.0, 3.0, 5.0],
            "plain": [1.5, 2.5, 3.0, 4.0],
            "plain in fp32": [1.0, 2.0, 3.0, 4.0],
        }
    )
    assert found["kernels"] == {"rms": 0.5, "mean": 0.25, "mean_of_last_quarter": 1.0}
    assert found["plain"]["mean"] == 0.25
    assert found["plain"]["mean_of_last_quarter"] == 0.0


def test_no_kernel_serves_the_plain_program(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (norm_rope, cross_entropy):
        monkeypatch.setattr(kernel, "serves", lambda x: True)
    replace_kernels()
    assert not norm_rope.serves(torch.zeros(1))
    assert not cross_entropy.serves(torch.zeros(1))


@pytest.mark.parametrize("config", ["configs/0.6b_softmax_adamw.toml", "configs/60m_parallax_muon.toml"])
def test_the_plain_program_has_overrides_of_every_config(config: str) -> None:
    run = load(RunConfig, config, PLAIN_OVERRIDES)
    assert not run.training.compile
    assert not run.training.cuda_graphs


def test_all_paths_are_trained_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, str]] = []

    def losses_of(path: str, name: str, steps: int, overrides: list[str]) -> list[float]:
        assert overrides == ["--run.seed", "3"]
        trained.append((path, name))
        return [5.0 + len(name) / 100 - step / steps for step in range(steps)]

    monkeypatch.setattr(plain_path, "losses_of", losses_of)
    words = ["one.toml", "two.toml", "--steps", "8", "--out", str(tmp_path), "--", "--run.seed", "3"]
    monkeypatch.setattr(sys, "argv", ["plain_path.py", *words])
    plain_path.main()
    assert trained == [(path, name) for path in ("one.toml", "two.toml") for name in plain_path.PATHS]
    assert {file.name for file in tmp_path.iterdir()} == {
        "plain_path.json",
        "plain_path.png",
        "plain_path.pdf",
    }
