"""Speed and memory of whole training steps.

`python -m benchmarks.training configs/0.6b_softmax_adamw.toml ... [-- --data.tokenizer DIR ...]` runs each
config from its TOML with torchrun for --steps steps of one micro-batch a rank, reads what the run recorded,
and prints medians over the steps after the warm-up beside what --dry-run said of the memory. Words after `--`
are overrides for every run, for example the data's place. Runs go side by side while there are GPUs, each
on its own. A config that fails is named at the end; the rows of the others are written as they come, and the
same command with --resume goes on with those that are missing.
"""

import argparse
import json
import os
import queue
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import config
from benchmarks.machine import RESULTS, describe, write_result
from training.run_config import RunConfig

WARMUP_STEPS = 5
FINAL_STEPS = 20


def _launch(path: str, gpus: Sequence[str], num_ranks: int, arguments: Sequence[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_ranks),
    ]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    subprocess.run(
        [*command, "train.py", "--config", path, *arguments], check=True, env={**os.environ, **visible}
    )


def _num_rows(path: str, overrides: Sequence[str]) -> int:
    """Rows of one micro-batch of a rank."""
    return config.load(RunConfig, path, overrides).training.local_batch_size


def _arguments(path: str, steps: int, num_ranks: int, overrides: Sequence[str]) -> list[str]:
    rows = str(_num_rows(path, overrides) * num_ranks)
    fixed = ["--training.global_batch_size", rows, "--training.stop_at_step", str(steps)]
    return [*overrides, *fixed, "--data.validation", "none"]


def predicted_peak_gib(path: str, *, steps: int, num_ranks: int, overrides: Sequence[str]) -> float:
    """What --dry-run says of a config's peak memory, as `measure` runs it."""
    arguments = [*_arguments(path, steps, num_ranks, overrides), "--dry-run", "--world-size", str(num_ranks)]
    said = subprocess.run(
        [sys.executable, "train.py", "--config", path, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return float(said.rstrip().splitlines()[-1].split()[-2])


def measure(
    path: str, *, steps: int, num_ranks: int, gpus: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """Train a config for some steps.

    Args:
        path: The TOML file.
        steps: Optimizer steps; the first WARMUP_STEPS are not counted.
        num_ranks: Processes, one per GPU.
        gpus: The GPUs that they see, as CUDA_VISIBLE_DEVICES names them; none for all.
        overrides: Words for train.py.

    Returns:
        Medians of tokens/s, MFU and seconds a step, peak memory, the first loss, the last, and the mean of
        the last FINAL_STEPS.
    """
    arguments = _arguments(path, steps, num_ranks, overrides)
    with tempfile.TemporaryDirectory() as folder:
        _launch(path, gpus, num_ranks, [*arguments, "--run.folder", folder])
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    timed = records[WARMUP_STEPS:]
    return {
        "peak_memory_gib": max((r["peak_memory_gib"] or 0.0 for r in timed), default=None),
        "peak_reserved_gib": max((r["peak_reserved_gib"] or 0.0 for r in timed), default=None),
        **{
            name: statistics.median([r[name] for r in timed])
            for name in ("tokens_per_second", "mfu_percent", "step_seconds", "data_wait_percent")
            if timed[0][name] is not None
        },
        "first_loss": records[0]["loss"],
        "last_loss": timed[-1]["loss"],
        "final_loss": statistics.fmean(r["loss"] for r in timed[-FINAL_STEPS:]),
        "rows": _num_rows(path, overrides),
    }


def earlier_rows(path: Path, command: str) -> list[dict[str, Any]]:
    """Rows that a run of the same command has left, each with its machine.

    Args:
        path: The JSON of that run; none there is no rows.
        command: What is to be the same.

    Raises:
        ValueError: Another command wrote the file, or another kind of machine: one table compares its rows.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["command"] != command:
        raise ValueError(f"--resume: {path} is from another command: {earlier['command']}")
    here = describe()
    for name in ("device", "torch", "cuda", "triton"):
        if earlier["machine"][name] != here[name]:
            raise ValueError(
                f"--resume: {path} has {name} {earlier['machine'][name]}, this machine {here[name]}; "
                "measure all configs anew, without --resume"
            )
    return [{"machine": earlier["machine"], **row} for row in earlier["rows"]]


def _measure_all(
    options: argparse.Namespace, overrides: Sequence[str], command: str, rows: list[dict[str, Any]]
) -> str:
    """Add the missing rows, in the order of the configs; return the names of the configs that failed."""
    num_gpus, num_ranks = torch.cuda.device_count(), options.ranks
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
    places: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
    for first in range(0, num_gpus - num_ranks + 1, num_ranks):
        places.put(visible[first : first + num_ranks])
    if places.empty():
        places.put(())

    common = {"steps": options.steps, "num_ranks": num_ranks, "overrides": overrides}

    def run(path: str) -> dict[str, Any]:
        gpus = places.get()
        try:
            return measure(path, gpus=gpus, **common)
        finally:
            places.put(gpus)

    measured = {row["config"] for row in rows}
    failed: list[str] = []
    # all of these first, and side by side: they take processors, which the runs are to have for themselves
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        said = {
            path: pool.submit(predicted_peak_gib, path, **common)
            for path in options.configs
            if path not in measured
        }
    with ThreadPoolExecutor(places.qsize()) as pool:
        waiting = {pool.submit(run, path): path for path, future in said.items() if not future.exception()}
        for path, future in said.items():
            if error := future.exception():
                print(f"{path}: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
                failed.append(path)
        for done in as_completed(waiting):
            path = waiting[done]
            if isinstance(done.exception(), subprocess.CalledProcessError):
                failed.append(path)
                continue
            row = {"config": path, "dry_run_peak_gib": said[path].result(), **done.result()}
            rows.append({"machine": describe(), **row})
            rows.sort(key=lambda row: options.configs.index(row["config"]))
            write_result(options.name, {"command": command, "rows": rows}, options.out)
    return " ".join(failed)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--name", default="training", help="name of the JSON in the results folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that the same command has measured before"
    )
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    options, overrides = parser.parse_args(words[:split]), words[split + 1 :]
    if options.steps <= WARMUP_STEPS:
        parser.error(
            f"--steps is {options.steps}, wanted over {WARMUP_STEPS}: those of the warm-up are not counted"
        )
    command = "python -m benchmarks.training " + shlex.join(word for word in words if word != "--resume")
    try:
        rows = earlier_rows(options.out / f"{options.name}.json", command) if options.resume else []
    except ValueError as error:
        parser.error(str(error))
    failed = _measure_all(options, overrides, command, rows)
    print(describe())
    print("| config | tokens/s | MFU % | step s | data wait % | peak GiB (said) | first loss | final loss |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [
            Path(r["config"]).stem,
            f"{r['tokens_per_second']:,.0f}",
            f"{r.get('mfu_percent', 0):.1f}",
            f"{r['step_seconds']:.3f}",
            f"{r['data_wait_percent']:.2f}",
            f"{r['peak_memory_gib']:.1f} ({r['dry_run_peak_gib']:.1f})",
            f"{r['first_loss']:.3f}",
            f"{r['final_loss']:.3f}",
        ]
        print("| " + " | ".join(cells) + " |")
    if failed:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
