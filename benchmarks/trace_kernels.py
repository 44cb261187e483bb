"""The GPU kernels of a torch profiler's trace, each with the operators and the step of its launch.

Host and GPU are at different steps at any time: a kernel is of the step in which the host launched it, and a
step is a time of the GPU.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_OPERATORS = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_STEP = "ProfilerStep#"
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul")


class Kernel(NamedTuple):
    """A kernel, a copy or a fill on the GPU.

    Attributes:
        name: Its name.
        start: When it starts, ms.
        end: When it ends, ms.
        operators: The host's operators and annotations around its launch, the outermost first. Kernels of a
            CUDA graph have those of the graph's launch.
        sizes: The sizes of the operands if the innermost operators are a matrix product; else empty.
        step: The number of the profiler's step in which a thread of the host launched it; None for a launch
            before the trace, or of a trace without steps.
    """

    name: str
    start: float
    end: float
    operators: tuple[str, ...] = ()
    sizes: frozenset[int] = frozenset()
    step: int | None = None


class _Launch(NamedTuple):
    time: float
    operators: tuple[Mapping[str, Any], ...] = ()


def kernels_of(trace: Mapping[str, Any]) -> list[Kernel]:
    """Return the kernels of a trace, the first to start first.

    Args:
        trace: The content of the JSON file.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    launches = _launches(event for event in events if event.get("cat") in (*_OPERATORS, *_LAUNCHES))
    steps = _host_steps(events)
    found = []
    for event in events:
        if event.get("cat") in _KERNELS:
            launch = launches.get(event.get("args", {}).get("correlation"), _Launch(-math.inf))
            products = [_sizes(each) for each in launch.operators if each["name"] in _PRODUCTS]
            # by time: the thread of the backward has no annotation
            around = (n for n, (start, end) in steps.items() if start <= launch.time <= end)
            found.append(
                Kernel(
                    name=event["name"],
                    start=event["ts"] / 1e3,
                    end=(event["ts"] + event["dur"]) / 1e3,
                    operators=tuple(each["name"] for each in launch.operators),
                    sizes=products[-1] if products else frozenset(),
                    step=next(around, None),
                )
            )
    return sorted(found, key=lambda kernel: kernel.start)


def last_step(trace: Mapping[str, Any]) -> tuple[list[Kernel], float]:
    """Return the kernels of the last traced step, the first to start first, and how long it lasts, ms.

    It lasts from the end of the last kernel of the step before to that of its own. Kernels of other steps
    that run within this time, such as a late collective, belong to it as far as they do, and its own only as
    far: kernels are cut at both borders. (The start of the profiler holds up the host, so the first traced
    step begins on an idle GPU; the second is launched while the GPU computes the first, as in training.)

    If a single step was traced, it has all later kernels, and lasts as long as for the host, less the time in
    which the GPU still worked on the step before. If none is marked, the trace is one step.

    Args:
        trace: The content of the JSON file.
    """
    kernels, host_steps = kernels_of(trace), _host_steps(trace["traceEvents"])
    if not host_steps:
        return kernels, _span(kernels)
    of_steps = [kernel for kernel in kernels if kernel.step is not None]
    ends: dict[int | None, float] = {}
    for kernel in of_steps:
        ends[kernel.step] = max(kernel.end, ends.get(kernel.step, kernel.end))
    if not ends:
        return [], 0.0
    *earlier, last = sorted(number for number in ends if number is not None)
    if earlier:
        start, end = ends[earlier[-1]], ends[last]
        return _between(kernels, start, end), end - start
    start = of_steps[0].start
    within = _between(kernels, start, math.inf)
    host_start, host_end = host_steps[last]
    before = [min(kernel.end, start) for kernel in kernels if kernel.start < start]
    return within, max(_span(within), host_end - max([host_start, *before]))


def _between(kernels: Sequence[Kernel], start: float, end: float) -> list[Kernel]:
    """Return the parts of the kernels between two times."""
    return [
        kernel._replace(start=max(kernel.start, start), end=min(kernel.end, end))
        for kernel in kernels
        if kernel.end > start and kernel.start < end
    ]


def _span(kernels: Sequence[Kernel]) -> float:
    return max(kernel.end for kernel in kernels) - kernels[0].start if kernels else 0.0


def _host_steps(events: Iterable[Mapping[str, Any]]) -> dict[int, tuple[float, float]]:
    """Return when the host starts and ends each traced step, ms, by its number."""
    return {
        int(event["name"].removeprefix(_STEP)): (event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(_STEP)
    }


def _launches(events: Iterable[Mapping[str, Any]]) -> dict[int, _Launch]:
    """Return time, in ms, and operators around each launch by its correlation."""
    threads = defaultdict[tuple[Any, Any], list[Mapping[str, Any]]](list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    found: dict[int, _Launch] = {}
    for thread in threads.values():
        around: list[Mapping[str, Any]] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if event["cat"] in _OPERATORS:
                around.append(event)
            elif "correlation" in event.get("args", {}):
                found[event["args"]["correlation"]] = _Launch(event["ts"] / 1e3, tuple(around))
    return found


def _sizes(operator: Mapping[str, Any]) -> frozenset[int]:
    shapes: Sequence[Any] = operator.get("args", {}).get("Input Dims", ())
    return frozenset(size for shape in shapes for size in shape if isinstance(size, int))
