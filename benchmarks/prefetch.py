"""What a step waits for prefetched items, and how their thread ends: torchdata alone, and our use of it.

    python -m benchmarks.prefetch [--other FILE]

FILE holds another `Prefetcher`, such as the thread of our own that torchdata's replaced:
`git show d0b6bee:data/loading/prefetch.py`. Implementations take turns; waits are the median over rounds.
"""

import importlib.util
import itertools
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torchdata
from torchdata.nodes import IterableWrapper
from torchdata.nodes import Prefetcher as Node

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from data.loading.prefetch import Prefetcher
from errors import run_command

_DEPTH = 4
_STEP_SECONDS = 0.02
_ROUNDS = 5
_STEPS = 100
_EXITS = 5

Items: TypeAlias = Callable[[], Iterator[float]]
Make: TypeAlias = Callable[[Items], Iterator[float]]

_IMPORT = {
    "torchdata": "from torchdata.nodes import IterableWrapper as I, Prefetcher as N; "
    "P = lambda f, n: N(I(f()), n)",
    "ours": "from data.loading.prefetch import Prefetcher as P",
}
# a thread that is in an operation of torch while the interpreter exits
_EXIT = "import torch; f = lambda: (torch.ones(1000, 1000) @ torch.ones(1000, 1000) for _ in iter(int, 1))"


def _slow(seconds: float) -> Items:
    """Items that each take some time, with the time at which they were ready."""

    def items() -> Iterator[float]:
        while True:
            time.sleep(seconds)
            yield time.perf_counter()

    return items


def _wait_of_a_step(make: Make) -> float:
    """Mean wait in microseconds per step, for items that are ready before the step ends."""
    items = make(_slow(_STEP_SECONDS / 4))
    waits = 0.0
    for _ in range(_STEPS):
        since = time.perf_counter()
        next(items)
        waits += time.perf_counter() - since
        time.sleep(_STEP_SECONDS)
    return 1e6 * waits / _STEPS


def _latency(make: Make) -> float:
    """Mean time in microseconds from when an item is ready to when a consumer that waits has it."""
    items = make(_slow(0.002))
    return 1e6 * statistics.mean(-(ready - time.perf_counter()) for ready in itertools.islice(items, _STEPS))


def _end(make: Make) -> dict[str, Any]:
    """Drop a prefetcher whose thread is two seconds into an item; count the threads that are left."""
    before = threading.active_count()
    going_on = threading.Event()

    def items() -> Iterator[float]:
        yield 0.0
        going_on.set()
        time.sleep(2)
        yield 1.0

    prefetcher = make(items)
    next(prefetcher)
    going_on.wait()
    since = time.perf_counter()
    del prefetcher
    return {"seconds": time.perf_counter() - since, "threads_left": threading.active_count() - before}


def _lines_of_an_error(make: Make) -> int:
    """Lines of the message in which an error of one line arrives."""

    def items() -> Iterator[float]:
        yield 0.0
        raise ValueError("part-7.parquet is damaged")

    prefetcher = make(items)
    next(prefetcher)
    try:
        next(prefetcher)
    except ValueError as error:
        return len(str(error).splitlines())
    raise AssertionError("no error arrived")


def _exit_codes(how: str) -> list[int]:
    code = f"{how}; {_EXIT}; p = P(f, {_DEPTH}); next(p)"
    return [
        subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode
        for _ in range(_EXITS)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Command-line arguments; None for sys.argv[1:].
    """
    parser = make_parser("prefetch", __doc__, name="prefetch_cpu_202611")
    parser.add_argument("--other", type=Path, metavar="FILE", help="another module with a Prefetcher")
    options = parse(parser, arguments)
    makes: dict[str, Make] = {
        "torchdata": lambda items: Node(IterableWrapper(items()), _DEPTH),
        "ours": lambda items: Prefetcher(items, _DEPTH),
    }
    imports = dict(_IMPORT)
    if options.other is not None:
        spec = importlib.util.spec_from_file_location("other", options.other)
        assert spec is not None
        assert spec.loader is not None
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
        makes["other"] = lambda items: other.Prefetcher(items, _DEPTH)
        folder, module = str(options.other.resolve().parent), options.other.stem
        imports["other"] = f"import sys; sys.path.insert(0, {folder!r}); from {module} import Prefetcher as P"
    rounds = [
        {name: (_wait_of_a_step(make), _latency(make)) for name, make in makes.items()}
        for _ in range(_ROUNDS)
    ]
    results = {
        name: {
            "wait_per_step_us": statistics.median(each[name][0] for each in rounds),
            "latency_us": statistics.median(each[name][1] for each in rounds),
            "dropped_within_an_item": _end(make),
            "lines_of_an_error": _lines_of_an_error(make),
            "exit_codes_within_torch": _exit_codes(imports[name]),
        }
        for name, make in makes.items()
    }
    for name, result in results.items():
        print(name, result)
    result = {
        "command": "python -m benchmarks.prefetch " + shlex.join(arguments or sys.argv[1:]),
        "load_average": os.getloadavg(),
        "torchdata": torchdata.__version__,
        "step_seconds": _STEP_SECONDS,
        "results": results,
        "rounds": rounds,
    }
    print(write_result(options.name, result, options.out))


if __name__ == "__main__":
    sys.exit(run_command(main))
