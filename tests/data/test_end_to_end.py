"""From text to training steps by the command lines: prepare shards, then run train.py on them."""

import subprocess
import sys
from pathlib import Path

from data.sources.split import is_held_out
from tests.conftest import make_text
from tests.training.launch import ROOT, SMALL, environment, records

TEXTS = [make_text(seed, 5 + 37 * (seed % 7)) for seed in range(200)]


def _run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_model_trains_and_validates_from_prepared_shards(corpus: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    printed = _run(
        *("-m", "data.shards", "prepare", "--files", str(corpus / "train.parquet")),
        *("--tokenizer", str(corpus), "--out", str(shards), "--shard-tokens", "5000", "--processes", "1"),
    )
    num_held_out = sum(map(is_held_out, TEXTS))
    assert f"{num_held_out} documents" in printed
    sources = [
        word
        for part in ("train", "validation")
        for word in (f"--data.{part}.kind", "shards", f"--data.{part}.folder", str(shards))
    ]
    printed = _run(
        *("train.py", "--config", "configs/debug_parallax_muon.toml", "--run.folder", str(tmp_path / "run")),
        *(*sources, "--data.tokenizer", str(corpus), "--data.validation_documents", "held_out"),
        *("--data.packing", "best_fit", "--data.shuffle_seed", "0", *SMALL, "--training.stop_at_step", "4"),
    )
    steps = [each for each in records(tmp_path / "run") if "loss" in each]
    assert [each["step"] for each in steps] == [1, 2, 3, 4]
    assert all(0 <= each["data_wait_percent"] < 100 for each in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert "held-out loss" in printed
