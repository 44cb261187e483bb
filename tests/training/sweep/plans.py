"""Small plans, and commands on them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.training.launch import ROOT, environment
from training.sweep.overview import Observer
from training.sweep.plan import PlanSource, load_plan

CONFIGS = ROOT / "configs"
RATE = "optimizer.groups.hidden.lr"

SHARED = """
model.size = "custom"
model.vocab_size = 300
training = {steps = 12, seq_len = 32, global_batch_size = 8, local_batch_size = 8}
data.tokenizer = "CORPUS"
data.train.files = ["CORPUS/train.parquet"]
data.validation.files = ["CORPUS/validation.parquet"]
metrics = {tensorboard = false, console_every = 1}
checkpoint = {every = 1, keep = 2}

[set.model.custom_size]
width = 32
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 16
mlp_width = 64
"""


def rates(values: Sequence[float], *, optimizer: str = "muon", seeds: Sequence[int] = (0,)) -> str:
    """A stage "rates" of softmax and Parallax that tunes the rate."""
    configs = [str(CONFIGS / f"debug_{kind}_{optimizer}.toml") for kind in ("softmax", "parallax")]
    return f"""
[[stages]]
name = "rates"
configs = {json.dumps(configs)}
seeds = {list(seeds)}

[[stages.axes]]
keys = ["{RATE}"]
values = {list(values)}
tuned = true
"""


def write_plan(folder: Path, stages: str, *, corpus: Path | str = "nowhere", head: str = "") -> Path:
    """Write a plan of small members; its folder is `plan` beside it."""
    path = folder / "plan.toml"
    shared = SHARED.replace("CORPUS", str(corpus))
    path.write_text(f"folder = {json.dumps(str(folder / 'plan'))}\n{head}\n[set]{shared}\n{stages}")
    return path


def observe(path: Path, folder: Path | None = None) -> Observer:
    words = [] if folder is None else [f"--folder={json.dumps(str(folder))}"]
    return Observer(load_plan(path, words), PlanSource(path, words))


def start(
    path: Path, *words: str, stand_in: bool = False, log: Path | None = None, gpus: str = ""
) -> subprocess.Popen[bytes]:
    """Start a sweep, with a stand-in for train.py or with itself."""
    module = "tests.training.sweep.stand_in" if stand_in else "training.sweep"
    with Path(os.devnull if log is None else log).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(path), *words],
            cwd=ROOT,
            # the stand-in is no file of the root, which Python adds for those
            env={**environment(), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": gpus},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def run(path: Path, *words: str, code: int = 0, stand_in: bool = True, gpus: str = "") -> str:
    """Run a sweep to its end, check the exit code, and return its output."""
    log = path.with_name("output.txt")
    log.unlink(missing_ok=True)
    sweep = start(path, *words, stand_in=stand_in, log=log, gpus=gpus)
    assert sweep.wait(timeout=300) == code, log.read_text()
    return log.read_text()
