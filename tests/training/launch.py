"""Run train.py as a user does, on a small corpus, and read its metrics."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SMALL = [
    *("--model.vocab_size", "300"),
    *("--training.seq_len", "32"),
    *("--training.global_batch_size", "8"),
    *("--training.local_batch_size", "2"),
    *("--training.steps", "20"),
    *("--metrics.tensorboard", "false"),
    *("--metrics.console_every", "1"),
]
# numbers of ranks are comparable in fp32 only
EXACT = ["--optimizer.groups.hidden.dtype", "float32"]


def arguments(
    config: str, corpus: Path, folder: Path, *overrides: str, program: Sequence[str] = ("train.py",)
) -> list[str]:
    """Return the command line of train.py, or of a program with the same options.

    It trains on the small corpus unless the overrides have another "--data.train".
    """
    files = ("--data.train.files", json.dumps([str(corpus / "train.parquet")]))
    data = [
        *("--data.tokenizer", str(corpus)),
        *(() if "--data.train" in overrides else files),
        *("--data.validation.files", json.dumps([str(corpus / "validation.parquet")])),
    ]
    return [
        *(*program, "--config", f"configs/{config}.toml", "--run.folder", str(folder)),
        *(*data, *SMALL, *overrides),
    ]


def command(ranks: int) -> list[str]:
    """Return the command that starts a program on a number of ranks."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def environment() -> dict[str, str]:
    """Return the environment: one thread per process, for reproducible sums."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}


def train(
    config: str,
    corpus: Path,
    folder: Path,
    *overrides: str,
    ranks: int = 1,
    code: int = 0,
    program: Sequence[str] = ("train.py",),
) -> str:
    """Run train.py or another program, check its exit code, and return its output."""
    done = subprocess.run(
        [*command(ranks), *arguments(config, corpus, folder, *overrides, program=program)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == code, printed[-4000:]
    return printed


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of every recorded step."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(folder) if "loss" in r]
