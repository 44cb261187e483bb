"""Time of a model's matrix products with cuBLAS's workspace and without it.

`python -m benchmarks.products configs/0.6b_softmax_adamw.toml ...` times the products of the configs' blocks,
forward and backward, bf16, at the tokens of a micro-batch: each twenty times in a CUDA graph, the median of
five replays. The two ways take turns in processes of their own, since cuBLAS reads CUBLAS_WORKSPACE_CONFIG
once; times are medians over three of these. `training.cublas` follows from what this measures.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from config import load
from errors import RunError, UserError, run_command
from training.preflight import build_meta_model
from training.run_config import RunConfig

WORKSPACES = {"with": None, "without": ":0:0"}
"""CUBLAS_WORKSPACE_CONFIG of each way; None for cuBLAS's own."""

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_IN_GRAPH, _REPLAYS, _ROUNDS = 20, 5, 3

Times = dict[str, float]
"""Product, such as "dW 1024 x 1024" -> time in us."""


def matrices(config: RunConfig) -> Counter[tuple[int, int]]:
    """Count the weight matrices of all blocks by their shapes (rows, columns)."""
    weights = (p for block in build_meta_model(config).layers for p in block.parameters() if p.ndim == 2)
    return Counter((p.shape[0], p.shape[1]) for p in weights)


def _median_time(product: Callable[[int], torch.Tensor]) -> float:
    """Return the time of a product in us, given two operands in turns."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        product(0)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(_IN_GRAPH):
                product(i % 2)
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / _IN_GRAPH * 1e3)
    return statistics.median(times)


def time_products(config: RunConfig) -> Times:
    """Time "y", "dx" and "dW" of each shape of matrices."""
    num_tokens = config.tokens_per_micro_batch
    times = {}
    for rows, columns in matrices(config):
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(2, num_tokens, columns, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(2, num_tokens, rows, device="cuda", dtype=torch.bfloat16)
        shape = f"{rows} x {columns}"
        times[f"y {shape}"] = _median_time(lambda i, x=x, w=weight: x[i] @ w.T)
        times[f"dx {shape}"] = _median_time(lambda i, dy=dy, w=weight: dy[i] @ w)
        times[f"dW {shape}"] = _median_time(lambda i, dy=dy, x=x: dy[i].T @ x[i])
    return times


def time_in_process(workspace: str | None, paths: Sequence[str]) -> dict[str, Times]:
    """Time the products of configs in a new process; returns the times of each path.

    Args:
        workspace: Of WORKSPACES.
        paths: The config files.

    Raises:
        RunError: The process has failed; its error is printed.
    """
    environment = {key: value for key, value in os.environ.items() if key != _VARIABLE}
    if workspace is not None:
        environment[_VARIABLE] = workspace
    command = [sys.executable, "-m", "benchmarks.products", "--child", *paths]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RunError(f"the products were not measured: {shlex.join(command)} has failed")
    return json.loads(done.stdout)


def measure(paths: Sequence[str]) -> dict[str, dict[str, Times]]:
    """Time the products of configs in both ways, in turns; returns medians by path and way."""
    rounds = [
        {way: time_in_process(workspace, paths) for way, workspace in WORKSPACES.items()}
        for _ in range(_ROUNDS)
    ]
    return {
        path: {way: _median([each[way][path] for each in rounds]) for way in WORKSPACES} for path in paths
    }


def _median(times: Sequence[Times]) -> Times:
    return {name: statistics.median(each[name] for each in times) for name in times[0]}


def layer_time(config: RunConfig, times: Times) -> float:
    """Return the time of the products of a block in us, the mean over blocks."""
    total = sum(
        count * times[f"{kind} {rows} x {columns}"]
        for (rows, columns), count in matrices(config).items()
        for kind in ("y", "dx", "dW")
    )
    return total / config.model.dimensions.num_layers


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = make_parser("products", __doc__, name="products")
    parser.add_argument("configs", nargs="*", help="config files")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parse(parser)
    if options.child is not None:
        print(json.dumps({path: time_products(load(RunConfig, path)) for path in options.child}))
        return
    if not options.configs:
        parser.error("the following arguments are required: configs")
    configs = {path: load(RunConfig, path) for path in options.configs}
    if not torch.cuda.is_available():
        raise UserError("this machine has no GPU: the benchmark measures products on one")
    rows = []
    for path, times in measure(options.configs).items():
        layer = {way: layer_time(configs[path], each) for way, each in times.items()}
        rows.append({"config": path, "layer_us": layer, "us": times})
        ratio = layer["without"] / layer["with"]
        print(f"{path}: a block takes {layer['with']:.0f} us with a workspace, {ratio:.3f} of it without")
        for name, time in times["with"].items():
            print(f"    {name:16}  {time:7.1f} us  {times['without'][name] / time:.3f}")
    command = shlex.join(["python", "-m", "benchmarks.products", *sys.argv[1:]])
    write_result(options.name, {"command": command, "rows": rows}, options.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
