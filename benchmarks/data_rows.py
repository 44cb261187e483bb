"""Cost of shuffling rows: the first batch, the loader's speed, bytes read and memory, against rows in order.

    python -m benchmarks.data_rows --files GLOB ... --tokenizer DIR
    python -m benchmarks.data_rows --folder SHARDS --tokenizer DIR

Each case iterates over the batches of one rank of --ranks in this thread, with shuffled documents and with
rows in order or shuffled. A step is 8 rows per rank for shards, and --global-batch rows for text. CPU time is
that of all threads of the process, to compare on a shared machine. The peak memory is that of Python objects
and arrays, measured in another, shorter run.
"""

import contextlib
import itertools
import os
import platform
import shlex
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from data.config import ParquetSource, ShardsSource
from data.loading.loader import DEFAULT_WINDOW_BATCHES, PackedLoader
from data.sources.base import DocumentSource
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from errors import run_command


@contextlib.contextmanager
def _counted_reads() -> Iterator[list[int]]:
    """Count the bytes that this process reads by `os.pread`, in a list of one number."""
    num_bytes, pread = [0], os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        num_bytes[0] += length
        return pread(descriptor, length, offset)

    os.pread = counted
    try:
        yield num_bytes
    finally:
        os.pread = pread


def _measure(
    source: DocumentSource, tokenizer: Tokenizer, num_steps: int, **arguments: Any
) -> dict[str, Any]:
    """Measure one loader over so many micro-batches."""

    def batches() -> Iterator[Any]:
        return iter(PackedLoader(source, tokenizer, dp_rank=0, prefetch_batches=0, **arguments))

    with _counted_reads() as num_bytes:
        since = time.perf_counter()
        iterator = batches()
        next(iterator)
        first = time.perf_counter() - since
        num_bytes[0] = 0
        seconds, cpu = [], time.process_time()
        for _ in range(num_steps):
            since = time.perf_counter()
            next(iterator)
            seconds.append(time.perf_counter() - since)
        cpu = time.process_time() - cpu
        num_rows = num_steps * arguments["local_batch_size"]
        read = num_bytes[0] / (num_rows * arguments["seq_len"] * 4)
    tracemalloc.start()
    iterator = batches()
    # of text, about as many rows are then read in order as shuffled, where the first batch reads a window
    is_shuffled = arguments["shuffle_seed"] is not None
    for _ in itertools.islice(iterator, num_steps // 4 if is_shuffled else num_steps):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "first_batch_s": round(first, 3),
        "own_rows_per_s": round(num_rows / sum(seconds)),
        "cpu_us_per_own_row": round(1e6 * cpu / num_rows),
        "slowest_batch_ms": round(1000 * max(seconds), 1),
        "bytes_read_per_byte_of_own_rows": round(read, 2),
        "peak_memory_mib": round(peak / 2**20, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Command-line arguments; None for sys.argv[1:].
    """
    parser = make_parser("data_rows", __doc__, name="data_rows_cpu_202611")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--files", nargs="+", metavar="GLOB", help="parquet files")
    group.add_argument("--folder", help="a prepared folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder that holds a tokenizer.json")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--global-batch", type=int, default=256, help="rows per step of text")
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks, for shards")
    options = parse(parser, arguments)
    tokenizer = Tokenizer.load(options.tokenizer)
    config = ParquetSource(files=options.files) if options.files else ShardsSource(folder=options.folder)
    world = 1 if options.files else options.ranks
    global_batch = options.global_batch if options.files else 8 * world
    found = []
    for packing, seq_len, seed in itertools.product(("concatenate", "best_fit"), options.seq_len, (None, 0)):
        case = {"packing": packing, "seq_len": seq_len, "shuffle_seed": seed}
        source = open_source(
            config,
            tokenizer_fingerprint=tokenizer.fingerprint,
            split="train",
            shuffle_seed=0,
            log_skipped=False,
        )
        sizes = {"local_batch_size": 8, "global_batch_size": global_batch, "dp_world_size": world}
        # a window of text; of shards, 4M tokens of all ranks
        num_steps = DEFAULT_WINDOW_BATCHES * global_batch // 8 if options.files else 2**22 // seq_len // 64
        found.append(case | _measure(source, tokenizer, num_steps, **case, **sizes))
        print(found[-1], flush=True)
    result = {
        "command": "python -m benchmarks.data_rows " + shlex.join(arguments or sys.argv[1:]),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cases": found,
    }
    print(write_result(options.name, result, options.out))


if __name__ == "__main__":
    sys.exit(run_command(main))
