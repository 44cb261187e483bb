"""Times the checked reading of checkpoints against torch's own: `python -m benchmarks.checkpoint_reading`.

One process reads a checkpoint from the page cache into the same tensors by both readers in turn. The
difference of the fastest of --repeats readings is what the checks cost.
"""

import argparse
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.machine import write_result
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


def _seconds(read: Callable[[], None]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=1024, help="size of the checkpoint (1024)")
    parser.add_argument("--repeats", type=int, default=7, help="readings by each reader (7)")
    options = parser.parse_args()
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
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(options.repeats):
            for name, reader in readers.items():
                seconds[name].append(_seconds(reader))
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    gibibytes = options.mebibytes / 1024
    best = {name: min(values) / gibibytes for name, values in seconds.items()}
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.checkpoint_reading", *sys.argv[1:]]),
        "mebibytes": options.mebibytes,
        "seconds": seconds,
        "best_seconds_per_gib": best,
        "extra_seconds_per_gib": best["checked"] - best["torch"],
    }
    print(", ".join(f"{name} {value:.2f} s per GiB" for name, value in best.items()))
    print(f"the checks cost {best['checked'] - best['torch']:.2f} s per GiB")
    print(write_result("checkpoint_reading", result))


if __name__ == "__main__":
    main()
