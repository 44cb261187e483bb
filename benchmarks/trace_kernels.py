"""The GPU kernels of a torch profiler's trace, each with the operators of the host that launched it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_OPERATORS = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
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
    """

    name: str
    start: float
    end: float
    operators: tuple[str, ...] = ()
    sizes: frozenset[int] = frozenset()


def kernels_of(trace: Mapping[str, Any]) -> list[Kernel]:
    """Return the kernels of a trace, the first to start first.

    Args:
        trace: The content of the JSON file.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    hosts = _launched_by(event for event in events if event.get("cat") in (*_OPERATORS, *_LAUNCHES))
    found = []
    for event in events:
        if event.get("cat") in _KERNELS:
            operators = hosts.get(event.get("args", {}).get("correlation"), ())
            products = [_sizes(each) for each in operators if each["name"] in _PRODUCTS]
            found.append(
                Kernel(
                    name=event["name"],
                    start=event["ts"] / 1e3,
                    end=(event["ts"] + event["dur"]) / 1e3,
                    operators=tuple(each["name"] for each in operators),
                    sizes=products[-1] if products else frozenset(),
                )
            )
    return sorted(found, key=lambda kernel: kernel.start)


def step_ms(trace: Mapping[str, Any]) -> float | None:
    """Return the time from the start of the traced step to that of the next, ms; None where it is missing."""
    durations = [
        event["dur"] / 1e3
        for event in trace["traceEvents"]
        if event.get("cat") == "user_annotation" and str(event.get("name")).startswith("ProfilerStep#")
    ]
    return sum(durations) if durations else None


def _launched_by(events: Iterable[Mapping[str, Any]]) -> dict[int, tuple[Mapping[str, Any], ...]]:
    """Return the operators around each launch by its correlation."""
    threads = defaultdict[tuple[Any, Any], list[Mapping[str, Any]]](list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    found: dict[int, tuple[Mapping[str, Any], ...]] = {}
    for thread in threads.values():
        around: list[Mapping[str, Any]] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if event["cat"] in _OPERATORS:
                around.append(event)
            elif "correlation" in event.get("args", {}):
                found[event["args"]["correlation"]] = tuple(around)
    return found


def _sizes(operator: Mapping[str, Any]) -> frozenset[int]:
    shapes: Sequence[Any] = operator.get("args", {}).get("Input Dims", ())
    return frozenset(size for shape in shapes for size in shape if isinstance(size, int))
