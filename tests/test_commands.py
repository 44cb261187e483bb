"""Every command line explains itself."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    *("data.sample", "data.shards", "data.train_tokenizer"),
    *("eval.diagnostics", "eval.downstream", "eval.mad", "eval.perplexity", "eval.report"),
    *("models.average", "models.checkpoint", "models.convert", "models.generation", "models.size_table"),
    "training.sweep",
]


@pytest.mark.parametrize("command", [["train.py"], *(["-m", module] for module in MODULES)], ids=" ".join)
def test_help(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["data.sample", "--ou", "x"],
        ["data.train_tokenizer", "--vocab", "300", "--files", "x", "--out", "y"],
        ["data.shards", "prepare", "--tok", "x", "--files", "x", "--out", "y"],
        ["data.shards", "info", "x", "--seq", "9"],
    ],
    ids=" ".join,
)
def test_options_are_not_abbreviated(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "unrecognized arguments" in done.stderr or "arguments are required" in done.stderr
