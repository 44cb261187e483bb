"""Throughput and memory of complete training steps, of configs and of stock torchtitan.

`python -m benchmarks.training configs/0.6b_softmax_adamw.toml ... [-- --data.tokenizer DIR ...]` trains each
config with torchrun for --steps steps of one micro-batch per rank (or of --rows-per-step rows), reads the
metrics of the run, and prints medians over the steps after the warm-up, beside the peak memory that --dry-run
predicts. Arguments after `--` are overrides of every run, for example the folder of the data. Runs are
parallel, each with GPUs of its own. Rows are written as they are measured; what fails is listed at the end,
and the same command with --resume measures only the missing rows.

`--stock` also trains stock torchtitan's Qwen3 (softmax attention, AdamW, random tokens, no document masks;
`benchmarks/stock_trainer.py`) at the sizes of the configs, in micro-batches of the configs' rows and of 4 and
8, and prints tokens/s of each config relative to it: in micro-batches of as many rows, and in its fastest
ones.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import add_resume, command_without_resume, make_parser, parse_with_overrides
from benchmarks.machine import describe, write_result
from benchmarks.stock_size import StockSize
from benchmarks.training_table import format_table
from config import load
from errors import UserError, run_command
from eval.gpus import visible_gpus
from models.run_folder import RunFolder
from training.run_config import RunConfig

WARMUP_STEPS = 5
FINAL_STEPS = 20
STOCK_ROWS = (4, 8)
"""Rows of a micro-batch with which stock torchtitan is measured, beside the configs' own."""

_MEDIANS = (
    *("tokens_per_second", "mfu_percent", "mfu_whole_rows_percent"),
    *("step_seconds", "data_wait_percent"),
)


class Job(NamedTuple):
    """What a row of the table measures.

    Attributes:
        config: The TOML file.
        stock_rows: Rows of a micro-batch of stock torchtitan's model of the config's size; None for the
            config itself.
    """

    config: str
    stock_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all jobs have in common.

    Attributes:
        steps: Optimizer steps; the first WARMUP_STEPS are not timed.
        num_ranks: Number of processes, one per GPU.
        rows_per_step: Rows of a step over all ranks; None for one micro-batch per rank.
        overrides: Overrides of the configs, as train.py takes them.
    """

    steps: int
    num_ranks: int
    rows_per_step: int | None
    overrides: Sequence[str]

    def load(self, path: str) -> RunConfig:
        """Load a config with the overrides."""
        return load(RunConfig, path, self.overrides)

    def rows_of_step(self, rows: int) -> int:
        """Return the rows of a step over all ranks, for micro-batches of so many rows."""
        return rows * self.num_ranks if self.rows_per_step is None else self.rows_per_step

    def arguments(self, path: str) -> list[str]:
        """Return train.py's arguments for a config."""
        rows = self.rows_of_step(self.load(path).training.local_batch_size)
        fixed = ["--training.global_batch_size", str(rows), "--training.stop_at_step", str(self.steps)]
        return ["--config", path, *self.overrides, *fixed, "--data.validation", "none"]


def stock_jobs(configs: Sequence[str], settings: Settings) -> list[Job]:
    """List the runs of stock torchtitan that the configs are compared with.

    Args:
        configs: The TOML files; those of one model size, vocabulary and sequence length share their runs,
            which have the first one's name.
        settings: What all jobs have in common; micro-batches that its rows per step are no multiple of are
            left out.
    """
    rows: dict[StockSize, set[int]] = {}
    firsts: dict[StockSize, str] = {}
    for path in configs:
        config = settings.load(path)
        size = StockSize.of(config)
        firsts.setdefault(size, path)
        rows.setdefault(size, set(STOCK_ROWS)).add(config.training.local_batch_size)
    return [
        Job(firsts[size], count)
        for size, counts in rows.items()
        for count in sorted(counts)
        if settings.rows_of_step(count) % (count * settings.num_ranks) == 0
    ]


def launch(program: Sequence[str], gpus: Sequence[str], num_ranks: int) -> None:
    """Run a program by torchrun.

    Args:
        program: A script, or "-m" and a module, and its arguments.
        gpus: The GPUs, as in CUDA_VISIBLE_DEVICES; empty for all.
        num_ranks: Number of processes, one per GPU.

    Raises:
        CalledProcessError: The program failed.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    subprocess.run(
        [*torchrun, "--nproc-per-node", str(num_ranks), *program], check=True, env={**os.environ, **visible}
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


def predicted_peak_gib(path: str, settings: Settings) -> float:
    """Return the peak memory in GiB that --dry-run predicts for a config, run as in `measure`."""
    arguments = [*settings.arguments(path), "--dry-run", "--world-size", str(settings.num_ranks)]
    report = subprocess.run(
        [sys.executable, "train.py", *arguments], check=True, capture_output=True, text=True
    ).stdout
    return float(report.rstrip().splitlines()[-1].split()[-2])


def measure(job: Job, settings: Settings, gpus: Sequence[str]) -> dict[str, Any]:
    """Train a config, or stock torchtitan's model of its size, for some steps.

    Args:
        job: What is measured.
        settings: What all jobs have in common.
        gpus: The GPUs of the run, as in CUDA_VISIBLE_DEVICES; empty for all.

    Returns:
        Medians of tokens/s, MFU, seconds per step and percentage of time waiting for data; peak memory in
        GiB; the first loss, the last, and the mean of the last FINAL_STEPS, in nats/token; the model size,
        and the rows of a micro-batch.
    """
    config = settings.load(job.config)
    rows = config.training.local_batch_size if job.stock_rows is None else job.stock_rows
    with tempfile.TemporaryDirectory() as folder:
        program = ["train.py", *settings.arguments(job.config), "--run.folder", folder]
        if job.stock_rows is not None:
            words = {"config": job.config, "rows": rows, "rows-per-step": settings.rows_of_step(rows)}
            words |= {"steps": settings.steps, "folder": folder}
            options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
            program = ["-m", "benchmarks.stock", *options, "--", *settings.overrides]
        launch(program, gpus, settings.num_ranks)
        records = read_steps(Path(folder))
    timed = records[WARMUP_STEPS:]
    return {
        "peak_memory_gib": max((r["peak_memory_gib"] or 0.0 for r in timed), default=None),
        "peak_reserved_gib": max((r["peak_reserved_gib"] or 0.0 for r in timed), default=None),
        **medians(timed),
        "first_loss": records[0]["loss"],
        "last_loss": timed[-1]["loss"],
        "final_loss": statistics.fmean(r["loss"] for r in timed[-FINAL_STEPS:]),
        "size": asdict(StockSize.of(config)),
        "rows": rows,
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


def _free_gpus(num_ranks: int) -> "queue.SimpleQueue[Sequence[str]]":
    """Return the sets of GPUs that runs take and put back; one empty set where there are too few."""
    visible, free = visible_gpus(), queue.SimpleQueue[Sequence[str]]()
    for first in range(0, len(visible) - num_ranks + 1, num_ranks):
        free.put(visible[first : first + num_ranks])
    if free.empty():
        free.put(())
    return free


def _measure_all(
    options: argparse.Namespace, settings: Settings, command: str, rows: list[dict[str, Any]]
) -> str:
    """Measure the missing rows, in the order of the jobs; return what failed."""
    listed = [Job(path) for path in options.configs]
    if options.stock:
        listed += stock_jobs(options.configs, settings)
    free_gpus = _free_gpus(settings.num_ranks)

    def run(job: Job) -> dict[str, Any]:
        gpus = free_gpus.get()
        try:
            return measure(job, settings, gpus)
        finally:
            free_gpus.put(gpus)

    missing = [job for job in listed if job not in {Job(r["config"], r["stock_rows"]) for r in rows}]
    failed: list[str] = []
    # all dry runs first, in parallel: they would take CPU time from the runs
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        predicted = {
            job: pool.submit(predicted_peak_gib, job.config, settings)
            for job in missing
            if job.stock_rows is None
        }
    for job, future in predicted.items():
        if error := future.exception():
            print(f"{job.config}: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
            failed.append(job.config)
    with ThreadPoolExecutor(free_gpus.qsize()) as pool:
        running = {
            pool.submit(run, job): job
            for job in missing
            if job not in predicted or not predicted[job].exception()
        }
        for done in as_completed(running):
            job = running[done]
            if isinstance(done.exception(), subprocess.CalledProcessError):
                is_stock = job.stock_rows is not None
                failed.append(f"{job.config}{f' (stock, {job.stock_rows} rows)' if is_stock else ''}")
                continue
            row = {**job._asdict(), **done.result()}
            row["dry_run_peak_gib"] = predicted[job].result() if job in predicted else None
            rows.append({"machine": describe(), **row})
            rows.sort(key=lambda row: listed.index(Job(row["config"], row["stock_rows"])))
            write_result(options.name, {"command": command, "rows": rows}, options.out)
    return " ".join(failed)


def main() -> None:
    """Run `python -m benchmarks.training`."""
    parser = make_parser("training", __doc__, name="training")
    parser.add_argument("configs", nargs="+", help="config files")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (20)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run, one per GPU (1)")
    parser.add_argument("--rows-per-step", type=int, help="rows of a step (one micro-batch per process)")
    parser.add_argument("--stock", action="store_true", help="measure stock torchtitan too")
    add_resume(parser)
    options, overrides = parse_with_overrides(parser)
    if options.steps <= WARMUP_STEPS:
        raise UserError(
            f"--steps is {options.steps}, must be more than {WARMUP_STEPS}: warm-up steps are not timed"
        )
    settings = Settings(
        steps=options.steps,
        num_ranks=options.ranks,
        rows_per_step=options.rows_per_step,
        overrides=overrides,
    )
    command = command_without_resume("training")
    rows = load_rows(options.out / f"{options.name}.json", command) if options.resume else []
    failed = _measure_all(options, settings, command, rows)
    print(describe())
    print(format_table(rows))
    if failed:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    sys.exit(run_command(main))
