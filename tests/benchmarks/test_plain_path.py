"""`benchmarks.plain_path`: the differences it prints, and its program without kernels."""

import json
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


def test_all_paths_are_trained_once_through_an_interruption_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, str]] = []

    def losses_of(path: str, name: str, steps: int, overrides: list[str]) -> list[float]:
        assert overrides == ["--run.seed", "3"]
        trained.append((path, name))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return [5.0 + len(name) / 100 - step / steps for step in range(steps)]

    monkeypatch.setattr(plain_path, "losses_of", losses_of)
    words = ["one.toml", "two.toml", "--steps", "8", "--out", str(tmp_path), "--", "--run.seed", "3"]
    monkeypatch.setattr(sys, "argv", ["plain_path.py", *words])
    with pytest.raises(KeyboardInterrupt):
        plain_path.main()
    monkeypatch.setattr(sys, "argv", ["plain_path.py", "--resume", *words])
    plain_path.main()
    all_runs = [(path, name) for path in ("one.toml", "two.toml") for name in plain_path.PATHS]
    assert trained == [*all_runs[:5], *all_runs[4:]]
    result = json.loads((tmp_path / "plain_path.json").read_text())
    assert result["command"] == "python -m benchmarks.plain_path " + " ".join(words)
    for row in result["rows"]:
        assert set(row["losses"]) == set(plain_path.PATHS)
        assert {len(losses) for losses in row["losses"].values()} == {8}
        assert set(row["differences"]) == {"kernels", "plain"}
    assert {file.name for file in tmp_path.iterdir()} == {
        "plain_path.json",
        "plain_path.png",
        "plain_path.pdf",
    }
