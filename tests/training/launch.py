"""Run train.py as a user does, on a small corpus, and read its metrics."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
_TIMEOUT = 150

SMALL = [
    *("--model.vocab_size", "300"),
    *("--training.seq_len", "32"),
    *("--training.global_batch_size", "8"),
    *("--training.local_batch_size", "2"),
    *("--training.steps", "20"),
    *("--metrics.tensorboard", "false"),
    *("--metrics.console_every", "1"),
]
LONG = ["--training.steps", "100000", "--data.validation", "none"]
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


class _Warm:
    """The process of warm.py, started at the first run."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def run(self, module: str | None, words: Sequence[str], ranks: int) -> tuple[int, str]:
        """Run train.py, or the module that stands for it, and return its exit code and output."""
        with self._lock, tempfile.TemporaryDirectory() as folder:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.training.warm"],
                    cwd=ROOT,
                    env=environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                )
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            request = {"module": module, "words": [*words], "ranks": ranks, "environment": environment()}
            request |= {file.name: str(file) for file in files}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            forks: list[int] = json.loads(process.stdout.readline())
            is_done = bool(select.select([process.stdout], [], [], _TIMEOUT)[0])
            for fork in () if is_done else forks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(fork, signal.SIGKILL)
            code = int(process.stdout.readline())
            printed = "".join(file.read_text() for file in files)
            assert is_done, f"not done after {_TIMEOUT} s: {printed[-4000:]}"
            return code, printed


_warm = _Warm()


def train(
    config: str,
    corpus: Path,
    folder: Path,
    *overrides: str,
    ranks: int = 1,
    code: int = 0,
    program: Sequence[str] = ("train.py",),
) -> str:
    """Run train.py or another program, check its exit code, and return its output.

    The ranks are forks of a process that has imported train.py (warm.py). Where several are to fail, torchrun
    starts them: what it does to the others belongs to the test.
    """
    words = arguments(config, corpus, folder, *overrides, program=())
    # CUDA does not survive a fork
    if (ranks == 1 or code == 0) and not torch.cuda.is_available():
        module, *first = program[1:] if program[0] == "-m" else (None, *program[1:])
        found, printed = _warm.run(module, [*first, *words], ranks)
    else:
        done = subprocess.run(
            [*command(ranks), *program, *words],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        found, printed = done.returncode, done.stdout + done.stderr
    assert found == code, printed[-4000:]
    return printed


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of every recorded step."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(folder) if "loss" in r]


def start_long(
    corpus: Path,
    folder: Path,
    *overrides: str,
    ranks: int = 1,
    program: Sequence[str] = ("train.py",),
) -> subprocess.Popen[str]:
    """Start a long run, and return it after its first step."""
    process = subprocess.Popen(
        [
            *command(ranks),
            *arguments("debug_parallax_muon", corpus, folder, *LONG, *overrides, program=program),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not losses(folder):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process
