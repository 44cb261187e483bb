"""Speed of MAD's training on a GPU: the six runs of a grid at once, replayed as a CUDA graph or not.

`python -m benchmarks.mad` times, for each attention and task at baseline level, a training step of all six
runs and their test: launched one by one, replayed, and replayed with compiled blocks. The losses of all three
are compared, after a test of the attention of heads of width 8 against fp64 where it is not a recurrence.
`grid_seconds` is the time of a whole grid, unless runs are solved before their last epoch. `step_kernels` and
`test_kernels` are the largest kernels of a step and of a test, traced after they were timed.
"""

import shlex
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import UserError, run_command
from eval.mad.model import attention_kinds, build_model
from eval.mad.runs import BATCH, RATES, Recipe, Run, grid
from eval.mad.settings import TASKS, Setting, Task, settings
from eval.mad.train import DataSets, Stack, free_memory
from models.attention.key_values import KeyValueAttention
from parallax.testing import assert_attention_within_budget, make_inputs

MODES = ("launched", "replayed", "compiled")
NUM_STEPS = 20
NUM_EPOCHS = 3
NUM_KERNELS = 20


def check_attention(kind: str, num_tokens: int) -> None:
    """Assert that the attention of MAD's heads in bf16 is as accurate as the plain computation.

    Args:
        kind: The attention; nothing is tested unless it is softmax or Parallax.
        num_tokens: T.
    """
    if kind not in ("softmax", "parallax"):
        return
    model = build_model(kind, settings("in-context-recall", "baseline")[0], 0).cuda()
    module = next(each for each in model.modules() if isinstance(each, KeyValueAttention))
    size = module.size
    inputs = make_inputs(
        4, num_tokens, size.num_heads, size.num_kv_heads, size.head_dim, dtype=torch.bfloat16, device="cuda"
    )
    inputs = inputs if kind == "parallax" else inputs.without_probes()

    def attend(q: Tensor, r: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        return module.attend(q, r, k, v, None, num_tokens)

    assert_attention_within_budget(attend, inputs)


def largest_kernels(work: Callable[[], object], num_times: int) -> dict[str, float]:
    """Return the kernels that take longest in ms, of work that does something num_times, for one of these."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda each: each.self_device_time_total, reverse=True)
    return {
        each.key[:90]: round(each.self_device_time_total / 1e3 / num_times, 4) for each in found[:NUM_KERNELS]
    }


def time_mode(runs: list[Run], mode: str) -> dict[str, Any]:
    """Train a few short epochs of a grid, and time those after the first.

    Returns:
        ms of a step and of a test, seconds of the first epoch with all preparation, the mean losses of the
        first epoch, the peak of memory in GB, and the largest kernels in ms.
    """
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    pool = None if mode == "launched" else torch.cuda.graph_pool_handle()
    with torch.cuda.stream(torch.cuda.Stream()):
        start = time.perf_counter()
        stack = Stack(runs, DataSets(runs, torch.device("cuda")), pool, is_compiled=mode == "compiled")
        losses = stack.train_epoch(0, [True] * len(runs)).tolist()
        stack.test().tolist()
        first = time.perf_counter() - start
        start = time.perf_counter()
        for epoch in range(NUM_EPOCHS):
            stack.train_epoch(1 + epoch, [True] * len(runs))
        torch.cuda.synchronize()
        trained = time.perf_counter() - start
        start = time.perf_counter()
        stack.test().tolist()
        tested = time.perf_counter() - start
        step_kernels = largest_kernels(lambda: stack.train_epoch(0, [True] * len(runs)), NUM_STEPS)
        test_kernels = largest_kernels(stack.test, 1)
    return {
        "step_ms": round(1e3 * trained / (NUM_EPOCHS * NUM_STEPS), 3),
        "test_ms": round(1e3 * tested, 1),
        "first_seconds": round(first, 1),
        "losses": losses,
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "step_kernels": step_kernels,
        "test_kernels": test_kernels,
    }


def measure(recipe: Recipe, setting: Setting, modes: list[str]) -> dict[str, Any]:
    """Measure one attention on one setting; an error is part of the result."""
    runs = grid(recipe, replace(setting, num_train_rows=NUM_STEPS * BATCH))
    result: dict[str, Any] = {
        "attention": recipe.attention,
        "optimizer": recipe.optimizer,
        "task": setting.task,
    }
    try:
        check_attention(recipe.attention, setting.num_tokens)
    except Exception:
        result["attention_error"] = traceback.format_exc()
    for mode in modes:
        try:
            found = time_mode(runs, mode)
        except Exception:
            result[mode] = {"error": traceback.format_exc()}
            continue
        steps = -(-setting.num_train_rows // BATCH)
        epoch_seconds = (steps * found["step_ms"] + found["test_ms"]) / 1e3
        found["grid_seconds"] = round(recipe.max_epochs * epoch_seconds + found["first_seconds"], 1)
        if "losses" in result.get("launched", {}):
            pairs = zip(result["launched"]["losses"], found["losses"], strict=True)
            found["loss_difference"] = max(abs(a - b) for a, b in pairs)
        result[mode] = found
    return result


def _describe(result: dict[str, Any]) -> str:
    """Describe a result in a line per mode."""
    lines = [f"{result['attention']} {result['optimizer']} {result['task']}"]
    if "attention_error" in result:
        lines.append(f"  attention: {result['attention_error'].splitlines()[-1]}")
    for mode in MODES:
        found = result.get(mode, {})
        if "error" in found:
            lines.append(f"  {mode}: {found['error']}")
        elif found:
            numbers = {key: value for key, value in found.items() if not isinstance(value, list | dict)}
            lines.append(f"  {mode}: " + ", ".join(f"{key} {value}" for key, value in numbers.items()))
            lines += [f"    {ms:.3f} ms a step in {name}" for name, ms in found["step_kernels"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and write JSON.

    Raises:
        UserError: There is no GPU.
    """
    parser = make_parser("mad", __doc__, name="mad")
    parser.add_argument(
        "--attention", nargs="+", default=["softmax", "parallax"], choices=[*attention_kinds()]
    )
    parser.add_argument("--tasks", nargs="+", default=["in-context-recall"], choices=TASKS)
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=[*RATES])
    parser.add_argument("--modes", nargs="+", default=[*MODES], choices=MODES)
    options = parse(parser)
    if not torch.cuda.is_available():
        raise UserError("python -m benchmarks.mad needs a GPU, and torch sees none")
    results: list[dict[str, Any]] = []
    for optimizer in options.optimizers:
        for kind in options.attention:
            for task in cast(list[Task], options.tasks):
                recipe = Recipe(attention=kind, optimizer=optimizer)
                results.append(measure(recipe, settings(task, "baseline")[0], options.modes))
                print(_describe(results[-1]), flush=True)
                command = shlex.join(["python", "-m", "benchmarks.mad", *sys.argv[1:]])
                write_result(options.name, {"command": command, "results": results}, options.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
