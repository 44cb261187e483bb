"""Throughput of complete training steps on 1, 2, 4, ... GPUs.

`python -m benchmarks.scaling configs/0.6b_parallax_muon.toml ... [-- --data.tokenizer DIR ...]` trains each
config for some steps on every power of two of the GPUs there are: with the same rows per GPU (one
micro-batch each), and with the same global batch (that of all GPUs, by gradient accumulation on fewer).
Models are sharded by FSDP2; from 4 GPUs on also by HSDP, in two replicas. Runs on fewer GPUs than there are
run side by side. Arguments after `--` are overrides of every run.

Rows are written as they are measured; `--resume` measures what the same command has not.

Efficiency is tokens/s per GPU relative to one GPU with one micro-batch. Communication is read from a trace of
one step: that of the rank that waits least for the others.
"""

import queue
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser, parse_with_overrides
from benchmarks.machine import describe, write_result
from benchmarks.step_trace import read_trace
from benchmarks.training import (
    WARMUP_STEPS,
    launch,
    load_rows,
    local_batch_size,
    medians,
    read_steps,
)
from errors import UserError, run_command
from eval.gpus import visible_gpus

# the last traced step, not that of the run, which writes a checkpoint; the profiler slows the steps around it
TRACED_STEP = 12
NUM_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Member:
    """A run of the table.

    Attributes:
        config: The TOML file.
        num_gpus: Number of GPUs.
        rows: Rows of the global batch.
        replicas: Replicas of the sharded model: 1 for FSDP2, more for HSDP.
    """

    config: str
    num_gpus: int
    rows: int
    replicas: int = 1


def members(config: str, rows_per_gpu: int, max_gpus: int) -> list[Member]:
    """List the runs of a config.

    Args:
        config: The TOML file.
        rows_per_gpu: Rows of a micro-batch.
        max_gpus: Number of GPUs of the machine.
    """
    counts = [1 << power for power in range(max_gpus.bit_length())]
    whole = rows_per_gpu * counts[-1]
    listed = [Member(config=config, num_gpus=n, rows=rows_per_gpu * n) for n in counts]
    listed += [Member(config=config, num_gpus=n, rows=whole) for n in counts[:-1]]
    listed += [Member(config=config, num_gpus=n, rows=rows_per_gpu * n, replicas=2) for n in counts if n >= 4]
    return listed


def measure(member: Member, gpus: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Train a member and read its records and the traces of its ranks.

    Args:
        member: The run.
        gpus: Its GPUs, as in CUDA_VISIBLE_DEVICES.
        overrides: Overrides of the config.

    Returns:
        The member; medians over the steps after the warm-up, those that the profiler slows left out; peak
        memory in GiB; communication, exposed communication and idle time in ms of the traced step.
    """
    arguments = {
        "training.global_batch_size": member.rows,
        "training.stop_at_step": NUM_STEPS,
        "parallelism.replicate": member.replicas,
        "metrics.profile_every": TRACED_STEP,
        "data.validation": "none",
    }
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        program = ["train.py", "--config", member.config, *overrides, *words, "--run.folder", folder]
        launch(program, gpus, member.num_gpus)
        records = read_steps(Path(folder))
        traces = [read_trace(Path(folder), rank) for rank in range(member.num_gpus)]
    timed = [r for r in records if r["step"] > WARMUP_STEPS and abs(r["step"] - TRACED_STEP) > 4]
    trace = min(traces, key=lambda each: each.exposed_communication)
    values = medians(timed)
    return {
        **asdict(member),
        **values,
        "tokens_per_second_per_gpu": values["tokens_per_second"] / member.num_gpus,
        "peak_memory_gib": max(r["peak_memory_gib"] for r in timed),
        "communication_ms": trace.communication,
        "exposed_communication_ms": trace.exposed_communication,
        "exposed_communication_ms_by_rank": [each.exposed_communication for each in traces],
        "idle_ms": trace.idle,
        "kernels_ms_by_class": trace.by_class,
        "final_loss": records[-1]["loss"],
    }


def measure_all(
    listed: Sequence[Member],
    overrides: Sequence[str],
    save: Callable[[list[dict[str, Any]]], None],
    saved: Sequence[dict[str, Any]] = (),
) -> tuple[list[dict[str, Any]], list[Member]]:
    """Measure members, those of fewest GPUs first and as many at a time as there are GPUs for.

    Args:
        listed: The runs.
        overrides: Overrides of every run.
        save: Called with all rows so far, after each.
        saved: Rows of members that are not measured again.

    Returns:
        The rows in the order of the members, and the members that failed.
    """
    names = [field.name for field in fields(Member)]
    done = {Member(**{name: row[name] for name in names}): row for row in saved}
    failed: list[Member] = []
    gpus = visible_gpus()
    for count in sorted({member.num_gpus for member in listed}):
        free: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        for first in range(0, len(gpus) - count + 1, count):
            free.put(gpus[first : first + count])

        def run(member: Member, free: queue.SimpleQueue[list[str]] = free) -> None:
            own = free.get()
            try:
                done[member] = measure(member, own, overrides)
            except (subprocess.CalledProcessError, UserError) as error:
                print(f"{member}: {error}", file=sys.stderr)
                failed.append(member)
            finally:
                free.put(own)
            save([done[each] for each in listed if each in done])

        with ThreadPoolExecutor(free.qsize()) as pool:
            list(pool.map(run, [each for each in listed if each.num_gpus == count and each not in done]))
    return [done[each] for each in listed if each in done], failed


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    one = {r["config"]: r["tokens_per_second_per_gpu"] for r in reversed(rows) if r["num_gpus"] == 1}
    columns = (
        "config | GPUs | rows | replicas | tokens/s | per GPU | efficiency | MFU % (whole rows) "
        "| communication ms (exposed) | idle ms | peak GiB"
    )
    print(f"| {columns} |\n|" + "---|" * 11)
    for r in rows:
        efficiency = r["tokens_per_second_per_gpu"] / one[r["config"]] if r["config"] in one else float("nan")
        cells = [
            Path(r["config"]).stem,
            str(r["num_gpus"]),
            str(r["rows"]),
            str(r["replicas"]),
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tokens_per_second_per_gpu']:,.0f}",
            f"{efficiency:.3f}",
            f"{r['mfu_percent']:.1f} ({r['mfu_whole_rows_percent']:.1f})",
            f"{r['communication_ms']:.1f} ({r['exposed_communication_ms']:.1f})",
            f"{r['idle_ms']:.1f}",
            f"{r['peak_memory_gib']:.1f}",
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Run `python -m benchmarks.scaling`."""
    parser = make_parser("scaling", __doc__, name="scaling")
    parser.add_argument("configs", nargs="+", help="config files")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that the same command has written before"
    )
    options, overrides = parse_with_overrides(parser)
    max_gpus = len(visible_gpus())
    if not max_gpus:
        raise UserError("this machine has no GPU: the benchmark measures training steps on GPUs")
    listed = [
        member
        for path in options.configs
        for member in members(path, local_batch_size(path, overrides), max_gpus)
    ]
    command = "python -m benchmarks.scaling " + shlex.join(
        each for each in sys.argv[1:] if each != "--resume"
    )
    saved = load_rows(options.out / f"{options.name}.json", command) if options.resume else []

    def save(rows: list[dict[str, Any]]) -> None:
        write_result(options.name, {"command": command, "rows": rows}, options.out)

    rows, failed = measure_all(listed, overrides, save, saved)
    print(describe())
    _print_table(rows)
    if failed:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    sys.exit(run_command(main))
