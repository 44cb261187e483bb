"""Summaries of profiler traces: kernels by class, idle time within and between steps, communication."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step_trace import (
    StepTrace,
    format_table,
    last_trace,
    main,
    read_trace,
    summarize,
    union_length,
)
from benchmarks.trace_kernels import kernels_of
from config import load
from errors import UserError
from models.run_folder import RunFolder
from training.run_config import RunConfig

Event = dict[str, Any]


def _event(category: str, name: str, start: float, end: float, **args: Any) -> Event:
    times = {"ts": 1e3 * start, "dur": 1e3 * (end - start)}
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": 2, **times, "args": args}


def _kernel(name: str, start: float, end: float, **args: Any) -> Event:
    return _event("kernel", name, start, end, **args)


STEP = [
    _event("user_annotation", "ProfilerStep#11", 0, 100),
    _event("cpu_op", "aten::mm", 1, 3, **{"Input Dims": [[32768, 1024], [1024, 3072]]}),
    _event("cuda_driver", "cuLaunchKernelEx", 2, 2.5, correlation=7),
    _event("user_annotation", "Optimizer.step#Muon.step", 60, 70),
    _event("cpu_op", "aten::baddbmm", 61, 63, **{"Input Dims": [[2, 64, 64], [2, 64, 64], [2, 64, 64]]}),
    _event("cuda_runtime", "cudaLaunchKernel", 62, 62.5, correlation=8),
    _event("cuda_runtime", "cudaLaunchKernel", 65, 66, correlation=9),
    _event("cuda_runtime", "cudaLaunchKernel", 71, 72, correlation=10),
    _kernel("nvjet_tst_128x256", 10, 40, correlation=7),
    _kernel("_parallax_fwd_hopper_kernel", 40, 50),
    _kernel("nvjet_tst_64x64", 60, 65, correlation=8),
    _kernel("at::native::vectorized_elementwise_kernel", 65, 67, correlation=9),
    _kernel("at::native::mystery_kernel", 72, 75, correlation=10),
    {"ph": "i", "cat": "cpu_op", "name": "an instant"},
]


def test_classes_and_idle_time_add_up_to_the_step() -> None:
    trace = summarize({"traceEvents": STEP})
    assert trace.by_class == {
        "matrix products": 30,
        "attention, forward": 10,
        "orthogonalization": 5,
        "other": 3,
        "optimizer": 2,
    }
    assert (trace.step, trace.span, trace.idle, trace.idle_between) == (100, 65, 15, 35)
    assert sum(trace.by_class.values()) + trace.idle + trace.idle_between == trace.step
    assert trace.named_percent == pytest.approx(97.0)
    assert trace.largest_other == {"at::native::mystery_kernel": 3}


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
    # time with two kernels counts once
    assert trace.by_class == {"communication": 3, "matrix products": 2, "attention, forward": 2}
    assert (trace.step, trace.idle_between) == (9, 0)


def test_union_of_intervals_equals_a_count_of_points() -> None:
    generator = random.Random(0)
    for _ in range(50):
        starts = [generator.randrange(40) for _ in range(8)]
        intervals = [(start, start + generator.randrange(1, 9)) for start in starts]
        assert union_length(intervals) == len({x for start, end in intervals for x in range(start, end)})


def test_kernels_have_the_operators_around_their_launch() -> None:
    product, _, bmm, elementwise, _ = kernels_of({"traceEvents": STEP})
    assert product.operators == ("ProfilerStep#11", "aten::mm")
    assert product.sizes == {32768, 1024, 3072}
    assert bmm.operators == ("ProfilerStep#11", "Optimizer.step#Muon.step", "aten::baddbmm")
    assert elementwise.operators == ("ProfilerStep#11", "Optimizer.step#Muon.step")
    assert elementwise.sizes == frozenset()


def _write_run(folder: Path) -> None:
    run = RunFolder(folder)
    run.write_config(load(RunConfig, "configs/0.6b_parallax_muon.toml", []))
    for step in (9, 100):
        traces = run.profile / f"iteration_{step}"
        traces.mkdir(parents=True)
        events = [*STEP, _kernel("x", 80, 80 + step)]
        (traces / "rank0_trace.json").write_text(json.dumps({"traceEvents": events}))


def test_the_last_trace_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    _write_run(tmp_path)
    assert read_trace(tmp_path).span == 170
    with pytest.raises(UserError, match="no trace of rank 1"):
        last_trace(tmp_path, 1)
    (RunFolder(tmp_path).profile / "iteration_100" / "rank0_trace.json").write_text("{}")
    with pytest.raises(UserError, match=r"rank0_trace\.json"):
        read_trace(tmp_path)


def test_matrix_products_have_roles_by_the_sizes_of_the_run(tmp_path: Path) -> None:
    _write_run(tmp_path)
    assert read_trace(tmp_path).by_class["matrix products, MLP"] == 30
    RunFolder(tmp_path).config_file.unlink()
    assert read_trace(tmp_path).by_class["matrix products"] == 30


def test_command_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["step_trace.py", str(tmp_path)])
    main()
    table = capsys.readouterr().out
    assert "| 30.00 | 17.6 | matrix products, MLP |" in table
    assert "| 25.00 |" not in table
    assert "39.4% of the step is idle or of a known class" in table
    monkeypatch.setattr(sys, "argv", ["step_trace.py", str(tmp_path), "--json"])
    main()
    found = json.loads(capsys.readouterr().out)
    named = found.pop("named_percent")
    assert StepTrace(**found).named_percent == named
    assert format_table(StepTrace(**found)) + "\n" == table
