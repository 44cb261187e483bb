"""Times the checked reading of checkpoints against torch's own: `python -m benchmarks.checkpoint_reading`.

One process reads a checkpoint from the page cache into the same tensors by both readers in turn. The
difference of the fastest of --repeats readings is what the checks cost. CPU seconds are those of all threads.
"""

import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import run_command
from models.checkpoint.reader import CheckpointReader


def _state(mebibytes: int) -> dict[str, torch.Tensor]:
    """Matrices of 4 to 64 MiB, as the shards of a model of 0.6B to 1.7B parameters on 8 ranks."""
    generator, state, left = torch.Generator().manual_seed(0), dict[str, torch.Tensor](), mebibytes
    sizes = [4, 4, 8, 12, 64]
    while left > 0:
        size = min(left, sizes[len(state) % len(sizes)])
        state[f"weight.{len(state)}"] = torch.randn(size * 2**18 // 1024, 1024, generator=generator)
        left -= size
    return state


def _seconds(read: Callable[[], None]) -> tuple[float, float]:
    """Return wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    read()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Run the command line."""
    parser = make_parser("checkpoint_reading", __doc__, name="checkpoint_reading")
    parser.add_argument("--mebibytes", type=int, default=1024, help="size of the checkpoint (1024)")
    parser.add_argument("--repeats", type=int, default=7, help="readings by each reader (7)")
    options = parse(parser)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    state = _state(options.mebibytes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-1"
        dcp.save(state, checkpoint_id=path, no_dist=True)
        read = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        readers: dict[str, Callable[[], None]] = {
            "torch": lambda: dcp.load(read, checkpoint_id=path, no_dist=True),
            "checked": lambda: dcp.load(read, storage_reader=CheckpointReader(path), no_dist=True),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        for _ in range(options.repeats):
            for name, reader in readers.items():
                seconds[name].append(_seconds(reader))
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    gibibytes = options.mebibytes / 1024
    best: dict[str, list[float]] = {
        name: [min(column) / gibibytes for column in zip(*values, strict=True)]
        for name, values in seconds.items()
    }
    extra = [checked - plain for checked, plain in zip(best["checked"], best["torch"], strict=True)]
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.checkpoint_reading", *sys.argv[1:]]),
        "mebibytes": options.mebibytes,
        "wall_and_cpu_seconds": seconds,
        "best_seconds_per_gib": best,
        "extra_seconds_per_gib": extra,
    }
    for name, (wall, cpu) in best.items():
        print(f"{name:<8} {wall:.2f} s per GiB, {cpu:.2f} CPU seconds")
    print(f"the checks cost {extra[0]:.2f} s per GiB, {extra[1]:.2f} CPU seconds")
    print(write_result(options.name, result, options.out))


if __name__ == "__main__":
    sys.exit(run_command(main))
