"""The last traced step: which kernels it has, and when it begins and ends, where the host is ahead."""

from itertools import count, pairwise
from typing import Any

import pytest

from benchmarks.step_trace import StepTrace, summarize
from benchmarks.trace_kernels import kernels_of, last_step
from errors import UserError

Event = dict[str, Any]
MAIN, BACKWARD = 1, 9
_IDS = count(1)  # correlations


def _event(category: str, name: str, start: float, end: float, thread: int = MAIN, **args: Any) -> Event:
    times = {"ts": 1e3 * start, "dur": 1e3 * (end - start)}
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, **times, "args": args}


def _launched(
    launch: float | None,
    *kernels: tuple[str, float, float],
    call: str = "cudaLaunchKernel",
    thread: int = MAIN,
) -> list[Event]:
    """Return kernels (name, start, end) of one launch, and the launch unless it came before the trace."""
    correlation = next(_IDS)
    host = (
        []
        if launch is None
        else [_event("cuda_runtime", call, launch, launch, thread, correlation=correlation)]
    )
    kinds = {"Memcpy": "gpu_memcpy", "Memset": "gpu_memset"}
    return host + [
        _event(kinds.get(name.split(" ")[0], "kernel"), name, start, end, correlation=correlation)
        for name, start, end in kernels
    ]


def _marks(*borders: float) -> list[Event]:
    return [
        _event("user_annotation", f"ProfilerStep#{number}", start, end)
        for number, (start, end) in enumerate(pairwise(borders), start=10)
    ]


BEFORE = _launched(None, ("nvjet_1", -10, 30), ("Memset (Device)", 30, 40))
FIRST = [
    *_launched(2, ("Memcpy HtoD (Pinned -> Device)", 41, 42), call="cudaMemcpyAsync"),
    *_launched(
        4,
        *[("Memset (Device)", 43, 44), ("nvjet_1", 44, 60), ("nvjet_2", 60, 70)],
        call="cudaGraphLaunch",
    ),
    *_launched(5, ("_parallax_bwd_dq_kernel", 71, 80), thread=BACKWARD),
    *_launched(6, ("ncclDevKernel_ReduceScatter", 75, 85), thread=BACKWARD),
    *_launched(7, ("multi_tensor_apply_kernel", 88, 90)),
]
# launched and, but for the last one, computed while the host is in its second step
SECOND = [
    *_launched(52, ("Memcpy HtoD (Pinned -> Device)", 93, 94), call="cudaMemcpyAsync"),
    *_launched(54, ("nvjet_1", 95, 110), call="cudaGraphLaunch"),
    *_launched(55, ("_parallax_bwd_dq_kernel", 111, 140), thread=BACKWARD),
]


def _trace(*events: Event, borders: tuple[float, ...] = (0, 50, 145)) -> dict[str, Any]:
    return {"traceEvents": [*_marks(*borders), *events]}


def _check_sum(trace: StepTrace) -> None:
    assert sum(trace.by_class.values()) + trace.idle + trace.idle_between == pytest.approx(trace.step)


def test_kernels_are_of_the_step_in_which_any_thread_launched_them() -> None:
    kernels = kernels_of(_trace(*BEFORE, *FIRST, *SECOND))
    assert [kernel.step for kernel in kernels] == [None] * 2 + [10] * 7 + [11] * 3


def test_the_second_of_two_steps_lasts_from_the_end_of_the_first_to_its_own() -> None:
    trace = summarize(_trace(*BEFORE, *FIRST, *SECOND))
    assert (trace.step, trace.span, trace.idle, trace.idle_between) == (140 - 90, 140 - 93, 1 + 1, 3)
    assert trace.by_class == {"attention, backward": 29, "matrix products": 15, "copies and casts": 1}
    _check_sum(trace)
    # the class of communication is there where it was, and the step before does not count
    alone = summarize(_trace(*FIRST, borders=(0, 100)))
    assert (alone.communication, alone.exposed_communication) == (10, 5)


def test_kernels_are_cut_where_the_step_begins_and_ends() -> None:
    # an all-gather of the second step that is early, a copy of the first on its way, and one of a third step
    early = _launched(53, ("ncclDevKernel_AllGather", 86, 96))
    running = _launched(None, ("ncclDevKernel_AllReduce", 38, 92))
    third = _launched(None, ("Memcpy DtoD (Device -> Device)", 139, 150))
    trace = summarize(_trace(*BEFORE, *running, *FIRST, *early, *SECOND, *third))
    assert (trace.step, trace.span, trace.idle_between) == (140 - 90, 140 - 90, 0)
    assert trace.largest["ncclDevKernel_AllGather"] == 6
    assert trace.largest["ncclDevKernel_AllReduce"] == 2
    assert trace.largest["Memcpy DtoD (Device -> Device)"] == 1
    assert "multi_tensor_apply_kernel" not in trace.largest
    assert trace.exposed_communication == 3 + 1
    _check_sum(trace)


def test_of_three_steps_the_last_begins_where_the_second_ends() -> None:
    third = _launched(142, ("nvjet_1", 144, 150))
    trace = summarize(_trace(*FIRST, *SECOND, *third, borders=(0, 50, 141, 160)))
    assert (trace.step, trace.idle_between, trace.by_class) == (10, 4, {"matrix products": 6})


def test_a_single_step_of_an_idle_gpu_lasts_as_long_as_for_the_host() -> None:
    # as traces were until the host went ahead: with all of the idle time before the first kernel
    trace = summarize(_trace(*FIRST, borders=(0, 100)))
    assert (trace.step, trace.span, trace.idle, trace.idle_between) == (100, 49, 5, 51)
    _check_sum(trace)


def test_a_single_step_starts_when_the_gpu_has_done_the_one_before() -> None:
    # a resume after the first of the two steps, or a run that ends there: the second has no kernels
    for borders in ((0, 100), (0, 100, 100.01)):
        trace = summarize(_trace(*BEFORE, *FIRST, borders=borders))
        assert (trace.step, trace.span, trace.idle_between) == (100 - 40, 49, 11)
        _check_sum(trace)
    late = _launched(None, ("ncclDevKernel_AllReduce", 38, 43))
    assert summarize(_trace(*BEFORE, *late, *FIRST, borders=(0, 100))).step == 100 - 41


def test_a_trace_that_ends_before_its_steps_is_refused() -> None:
    assert last_step(_trace(*BEFORE, borders=(0, 0.01))) == ([], 0.0)
    with pytest.raises(UserError, match="no GPU kernels of a step"):
        summarize(_trace(*BEFORE, borders=(0, 0.01)))
    with pytest.raises(UserError, match="no GPU kernels of a step"):
        summarize({"traceEvents": []})
