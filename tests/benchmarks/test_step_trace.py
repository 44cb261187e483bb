"""Summaries of profiler traces."""

import json
import random
from pathlib import Path

import pytest

from benchmarks.step_trace import class_of, last_trace, read_trace, summarize, union_length
from errors import UserError


def _kernel(name: str, start: float, end: float) -> dict[str, object]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": 1e3 * start, "dur": 1e3 * (end - start)}


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    events = [
        _kernel("ncclDevKernel_AllGather_RING_LL", 0, 4),
        _kernel("nvjet_tst_128x256", 1, 3),
        _kernel("_parallax_fwd_hopper_kernel", 2, 5),
        _kernel("ncclDevKernel_ReduceScatter", 7, 9),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1e6},
    ]
    trace = summarize({"traceEvents": events})
    assert (trace.span, trace.idle, trace.communication, trace.exposed_communication) == (9, 2, 6, 3)
    assert trace.by_class == {"communication": 6, "attention": 3, "matrix products": 2}


def test_union_of_intervals_equals_a_count_of_points() -> None:
    generator = random.Random(0)
    for _ in range(50):
        starts = [generator.randrange(40) for _ in range(8)]
        intervals = [(start, start + generator.randrange(1, 9)) for start in starts]
        assert union_length(intervals) == len({x for start, end in intervals for x in range(start, end)})


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("triton_poi_fused_silu_mul_0", "compiled"),
        ("norm_rope_backward_kernel", "norm and RoPE"),
        ("cross_entropy_kernel", "loss"),
        ("_softmax_bwd_dq_hopper_kernel", "attention"),
        ("triton_per_fused__softmax_0", "compiled"),
        ("_symmetric_product_kernel", "orthogonalization"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("elementwise_kernel", "other"),
    ],
)
def test_class_of_a_kernel(kernel: str, expected: str) -> None:
    assert class_of(kernel) == expected


def test_the_last_trace_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 100):
        folder = tmp_path / f"iteration_{step}"
        folder.mkdir()
        (folder / "rank0_trace.json").write_text(json.dumps({"traceEvents": [_kernel("x", 0, step)]}))
    assert read_trace(last_trace(tmp_path)).span == 100
    with pytest.raises(UserError, match="no trace of rank 1"):
        last_trace(tmp_path, 1)
    (tmp_path / "iteration_100" / "rank0_trace.json").write_text("{}")
    with pytest.raises(UserError, match=r"rank0_trace\.json"):
        read_trace(last_trace(tmp_path))
