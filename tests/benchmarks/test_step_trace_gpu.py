"""The trace of a real training step, launched ahead: its classes, almost nothing without one, its length."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.step_trace import last_trace, read_trace
from benchmarks.trace_kernels import kernels_of, last_step
from config import load
from models.init import init_weights
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from training.run_config import RunConfig

pytestmark = pytest.mark.gpu

# half a second of an H200, much longer than a step of the model
_BUSY_CYCLES = 1_000_000_000


def test_classes_of_a_traced_step(tmp_path: Path) -> None:
    config = load(RunConfig, "configs/debug_parallax_adamw.toml", [])
    run = RunFolder(tmp_path)
    run.write_config(config)
    model = Qwen3(config.model)
    init_weights(model, 0)
    model.to("cuda", torch.bfloat16)
    for block in model.layers:
        block.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, config.model.vocab_size, (1, 1024), device="cuda")
    documents = torch.tensor([0, 100, 1024], dtype=torch.int32, device="cuda")

    def step() -> None:
        model(ids, cu_seqlens=documents, max_seqlen=1024, labels_BT=ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def write(profiler: profile) -> None:
        folder = run.profile / f"iteration_{profiler.step_num}"
        folder.mkdir(parents=True)
        profiler.export_chrome_trace(str(folder / "rank0_trace.json"))

    step()
    torch.cuda.synchronize()
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
        schedule=schedule(wait=0, warmup=1, active=2),
        on_trace_ready=write,
        record_shapes=True,
    ) as profiler:
        step()
        # the GPU is a step behind when the trace begins, and computes the first step while the host launches
        # the second
        torch.cuda._sleep(_BUSY_CYCLES)
        profiler.step()
        step()
        profiler.step()
        step()
        torch.cuda.synchronize()
        profiler.step()
    trace = read_trace(tmp_path)
    content = json.loads(last_trace(tmp_path).read_text(encoding="utf-8"))
    assert {kernel.step for kernel in kernels_of(content)} - {None} == {1, 2}
    assert {kernel.step for kernel in last_step(content)[0]} == {2}
    assert trace.step < 200
    roles = {f"matrix products, {role}" for role in ("head", "MLP", "attention projections")}
    others = {"attention, forward", "attention, backward", "norms and RoPE", "SwiGLU", "loss", "optimizer"}
    assert roles | others <= set(trace.by_class)
    busy = sum(trace.by_class.values())
    assert busy + trace.idle + trace.idle_between == pytest.approx(trace.step)
    assert trace.idle_between >= 0
    assert trace.by_class.get("other", 0.0) <= 0.05 * busy, trace.largest_other
