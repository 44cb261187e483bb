"""Where the GPU time of a training step goes: kernels by class, idle time, exposed communication.

`python -m benchmarks.step_trace RUN/profile` summarizes the last step that a run with metrics.profile_every
traced.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import UserError, run_command

# the first pattern that occurs in a kernel's name decides
_CLASSES = {
    "communication": ("nccl",),
    "compiled": ("triton_",),
    "norm and RoPE": ("norm_rope",),
    "loss": ("cross_entropy",),
    "attention": ("parallax_", "softmax_", "key_norms", "document_bounds", "flash", "fmha", "sdpa"),
    "orthogonalization": ("symmetric_product",),
    "optimizer": ("multi_tensor", "adam", "update_momentum", "apply_update"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "copies": ("memcpy", "memset"),
}

Interval = tuple[float, float]


@dataclass(frozen=True)
class StepTrace:
    """The kernels of a traced step of one rank, in ms; kernels that run at the same time count in each class.

    Attributes:
        span: From the start of the first kernel to the end of the last.
        idle: Time within the span without any kernel.
        communication: Time with a collective running; it includes waiting for the slowest rank.
        exposed_communication: Time with a collective running and nothing else.
        by_class: Sum of the kernels' durations, by class.
        largest: The same by name of the kernel, the largest first.
    """

    span: float
    idle: float
    communication: float
    exposed_communication: float
    by_class: dict[str, float]
    largest: dict[str, float]


def class_of(kernel: str) -> str:
    """Return the class of a kernel, by its name."""
    name = kernel.lower()
    return next((each for each, parts in _CLASSES.items() if any(p in name for p in parts)), "other")


def union_length(intervals: Iterable[Interval]) -> float:
    """Return the length of a union of (start, end) intervals."""
    length, last = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, last))
        last = max(last, end)
    return length


def summarize(trace: Mapping[str, Any], num_largest: int = 25) -> StepTrace:
    """Summarize a trace of torch's profiler with one traced step.

    Args:
        trace: The content of the JSON file.
        num_largest: Number of kernels to list by name.

    Raises:
        UserError: The trace holds no kernels.
    """
    kernels = [
        (event["name"], event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if not kernels:
        raise UserError("the trace holds no GPU kernels: trace a run on a GPU")
    by_class, by_name = Counter[str](), Counter[str]()
    collectives, others = list[Interval](), list[Interval]()
    for name, start, end in kernels:
        which = class_of(name)
        by_class[which] += end - start
        by_name[name] += end - start
        (collectives if which == "communication" else others).append((start, end))
    span = max(end for _, _, end in kernels) - min(start for _, start, _ in kernels)
    busy, busy_with_others = union_length([*collectives, *others]), union_length(others)
    return StepTrace(
        span=span,
        idle=span - busy,
        communication=union_length(collectives),
        exposed_communication=busy - busy_with_others,
        by_class=dict(by_class.most_common()),
        largest=dict(by_name.most_common(num_largest)),
    )


def last_trace(folder: Path, rank: int = 0) -> Path:
    """Return the last trace that a rank wrote.

    Args:
        folder: RUN/profile of a run.
        rank: The rank.

    Raises:
        UserError: There is none.
    """
    found = folder.glob(f"iteration_*/rank{rank}_trace.json")
    last = max(found, key=lambda path: int(path.parent.name.split("_")[1]), default=None)
    if last is None:
        raise UserError(f"{folder} holds no trace of rank {rank}: run with metrics.profile_every")
    return last


def read_trace(path: Path) -> StepTrace:
    """Summarize a trace file.

    Raises:
        UserError: It is no trace with GPU kernels; names it.
    """
    try:
        return summarize(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def main() -> None:
    """Run `python -m benchmarks.step_trace`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="RUN/profile")
    parser.add_argument("--rank", type=int, default=0, help="rank whose trace to read (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    path = last_trace(options.folder, options.rank)
    trace = read_trace(path)
    if options.json:
        print(json.dumps(asdict(trace), indent=1))
        return
    print(
        f"{path}\n{trace.span:.1f} ms, idle {trace.idle:.1f}, communication {trace.communication:.1f} "
        f"(exposed {trace.exposed_communication:.1f})"
    )
    for title, times in (("class", trace.by_class), ("kernel", trace.largest)):
        print(f"\n| ms | {title} |\n|---|---|")
        for name, time in times.items():
            print(f"| {time:.2f} | {name[:100]} |")


if __name__ == "__main__":
    sys.exit(run_command(main))
