"""Throughput and memory of complete training steps.

`python -m benchmarks.training configs/0.6b_softmax_adamw.toml ... [-- --data.tokenizer DIR ...]` trains each
config with torchrun for --steps steps of one micro-batch per rank, reads the metrics of the run, and prints
medians over the steps after the warm-up, beside the peak memory that --dry-run predicts. Arguments after `--`
are overrides of every run, for example the folder of the data. Runs are parallel, each with GPUs of its own.
Rows are written as they are measured; configs that fail are listed at the end, and the same command with
--resume measures only the missing rows.
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

from benchmarks.machine import RESULTS, describe, write_result
from config import load
from errors import UserError, run_command
from eval.gpus import visible_gpus
from models.run_folder import RunFolder
from training.run_config import RunConfig

WARMUP_STEPS = 5
FINAL_STEPS = 20
_MEDIANS = (
    *("tokens_per_second", "mfu_percent", "mfu_whole_rows_percent"),
    *("step_seconds", "data_wait_percent"),
)


def launch(path: str, gpus: Sequence[str], num_ranks: int, arguments: Sequence[str]) -> None:
    """Train a config by torchrun.

    Args:
        path: The TOML file.
        gpus: The GPUs, as in CUDA_VISIBLE_DEVICES; empty for all.
        num_ranks: Number of processes, one per GPU.
        arguments: Overrides of the config.

    Raises:
        CalledProcessError: The run failed.
    """
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


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run's steps.

    Args:
        folder: The run folder.
    """
    lines = RunFolder(folder).metrics_file.read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def medians(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return medians of tokens/s, MFU in percent, seconds per step and percentage of waiting for data."""
    return {
        name: statistics.median([record[name] for record in records])
        for name in _MEDIANS
        if records[0][name] is not None
    }


def local_batch_size(path: str, overrides: Sequence[str]) -> int:
    """Return a config's rows per micro-batch of a GPU."""
    return load(RunConfig, path, overrides).training.local_batch_size


def _arguments(path: str, steps: int, num_ranks: int, overrides: Sequence[str]) -> list[str]:
    global_batch_size = str(local_batch_size(path, overrides) * num_ranks)
    fixed = ["--training.global_batch_size", global_batch_size, "--training.stop_at_step", str(steps)]
    return [*overrides, *fixed, "--data.validation", "none"]


def predicted_peak_gib(path: str, *, steps: int, num_ranks: int, overrides: Sequence[str]) -> float:
    """Return the peak memory in GiB that --dry-run predicts for a config, run as in `measure`."""
    arguments = [*_arguments(path, steps, num_ranks, overrides), "--dry-run", "--world-size", str(num_ranks)]
    report = subprocess.run(
        [sys.executable, "train.py", "--config", path, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return float(report.rstrip().splitlines()[-1].split()[-2])


def measure(
    path: str, *, steps: int, num_ranks: int, gpus: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """Train a config for some steps.

    Args:
        path: The TOML file.
        steps: Optimizer steps; the first WARMUP_STEPS are not timed.
        num_ranks: Number of processes, one per GPU.
        gpus: Their GPUs, as in CUDA_VISIBLE_DEVICES; empty for all.
        overrides: Overrides of the config, as train.py takes them.

    Returns:
        Medians of tokens/s, MFU, seconds per step and percentage of time waiting for data; peak memory in
        GiB; the first loss, the last, and the mean of the last FINAL_STEPS, in nats/token.
    """
    arguments = _arguments(path, steps, num_ranks, overrides)
    with tempfile.TemporaryDirectory() as folder:
        launch(path, gpus, num_ranks, [*arguments, "--run.folder", folder])
        records = read_steps(Path(folder))
    timed = records[WARMUP_STEPS:]
    return {
        "peak_memory_gib": max((r["peak_memory_gib"] or 0.0 for r in timed), default=None),
        "peak_reserved_gib": max((r["peak_reserved_gib"] or 0.0 for r in timed), default=None),
        **medians(timed),
        "first_loss": records[0]["loss"],
        "last_loss": timed[-1]["loss"],
        "final_loss": statistics.fmean(r["loss"] for r in timed[-FINAL_STEPS:]),
        "rows": local_batch_size(path, overrides),
    }


def load_rows(path: Path, command: str) -> list[dict[str, Any]]:
    """Load the rows that an interrupted run of the same command has written.

    Args:
        path: The JSON file of that run; it may be missing.
        command: The command.

    Returns:
        The rows, each with the description of its machine.

    Raises:
        UserError: Another command wrote the file, or another kind of machine, whose rows are not comparable.
    """
    if not path.exists():
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["command"] != command:
        raise UserError(f"--resume: {path} is from another command: {saved['command']}")
    here = describe()
    for name in ("device", "torch", "cuda", "triton"):
        if saved["machine"][name] != here[name]:
            raise UserError(
                f"--resume: {path} has {name} {saved['machine'][name]}, this machine {here[name]}; "
                "measure all configs again, without --resume"
            )
    return [{"machine": saved["machine"], **row} for row in saved["rows"]]


def _measure_all(
    options: argparse.Namespace, overrides: Sequence[str], command: str, rows: list[dict[str, Any]]
) -> str:
    """Measure the missing rows, in the order of the configs; return the configs that failed."""
    num_ranks, visible = options.ranks, visible_gpus()
    free_gpus: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
    for first in range(0, len(visible) - num_ranks + 1, num_ranks):
        free_gpus.put(visible[first : first + num_ranks])
    if free_gpus.empty():
        free_gpus.put(())

    common = {"steps": options.steps, "num_ranks": num_ranks, "overrides": overrides}

    def run(path: str) -> dict[str, Any]:
        gpus = free_gpus.get()
        try:
            return measure(path, gpus=gpus, **common)
        finally:
            free_gpus.put(gpus)

    measured = {row["config"] for row in rows}
    failed: list[str] = []
    # all dry runs first, in parallel: they would take CPU time from the runs
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        predicted = {
            path: pool.submit(predicted_peak_gib, path, **common)
            for path in options.configs
            if path not in measured
        }
    with ThreadPoolExecutor(free_gpus.qsize()) as pool:
        running = {
            pool.submit(run, path): path for path, future in predicted.items() if not future.exception()
        }
        for path, future in predicted.items():
            if error := future.exception():
                print(f"{path}: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
                failed.append(path)
        for done in as_completed(running):
            path = running[done]
            if isinstance(done.exception(), subprocess.CalledProcessError):
                failed.append(path)
                continue
            row = {"config": path, "dry_run_peak_gib": predicted[path].result(), **done.result()}
            rows.append({"machine": describe(), **row})
            rows.sort(key=lambda row: options.configs.index(row["config"]))
            write_result(options.name, {"command": command, "rows": rows}, options.out)
    return " ".join(failed)


def main() -> None:
    """Run `python -m benchmarks.training`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="config files")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (20)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run, one per GPU (1)")
    parser.add_argument("--name", default="training", help="name of the JSON file in --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that the same command has written before"
    )
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, overrides = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if options.steps <= WARMUP_STEPS:
        raise UserError(
            f"--steps is {options.steps}, must be more than {WARMUP_STEPS}: warm-up steps are not timed"
        )
    command = "python -m benchmarks.training " + shlex.join(each for each in arguments if each != "--resume")
    rows = load_rows(options.out / f"{options.name}.json", command) if options.resume else []
    failed = _measure_all(options, overrides, command, rows)
    print(describe())
    columns = (
        "config | tokens/s | MFU % (whole rows) | step s | data wait % | peak GiB (dry run) "
        "| first loss | final loss"
    )
    print(f"| {columns} |\n|" + "---|" * 8)
    for r in rows:
        cells = [
            Path(r["config"]).stem,
            f"{r['tokens_per_second']:,.0f}",
            f"{r.get('mfu_percent', 0):.1f} ({r.get('mfu_whole_rows_percent', 0):.1f})",
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
    sys.exit(run_command(main))
