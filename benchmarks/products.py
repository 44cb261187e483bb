"""Time of a layer's matrix products with cuBLAS's workspace and without it.

`python -m benchmarks.products` times the products of a layer of our sizes, forward and backward, bf16: each
twenty times in a CUDA graph. The two ways take turns in processes of their own, since cuBLAS reads
CUBLAS_WORKSPACE_CONFIG once; each product's time is the median over all replays.
`training.device.choose_products` decides by what this measures.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import RESULTS, write_result
from errors import UserError, check_out, run_command
from models.sizes import SIZES, ModelSize

WORKSPACES = {"with": None, "without": ":0:0"}
"""CUBLAS_WORKSPACE_CONFIG of each way; None for cuBLAS's own."""

_IN_GRAPH, _REPLAYS, _ROUNDS = 20, 5, 3


def matrices(size: ModelSize) -> dict[tuple[int, int], int]:
    """Return how many weight matrices of each shape (rows, columns) a layer with softmax attention has."""
    queries, keys = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    shapes = [(queries, size.width), (keys, size.width), (keys, size.width), (size.width, queries)]
    shapes += [(size.mlp_width, size.width), (size.mlp_width, size.width), (size.width, size.mlp_width)]
    return {shape: shapes.count(shape) for shape in shapes}


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


def time_products(size: ModelSize, num_tokens: int) -> dict[str, float]:
    """Time the products of a layer.

    Args:
        size: The model's.
        num_tokens: Tokens of a micro-batch.

    Returns:
        Times in us, of "y", "dx" and "dW" with the weight's shape.
    """
    times = {}
    for rows, columns in matrices(size):
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(2, num_tokens, columns, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn(2, num_tokens, rows, device="cuda", dtype=torch.bfloat16)
        shape = f"{rows} x {columns}"
        times[f"y {shape}"] = _median_time(lambda i, x=x, w=weight: x[i] @ w.T)
        times[f"dx {shape}"] = _median_time(lambda i, dy=dy, w=weight: dy[i] @ w)
        times[f"dW {shape}"] = _median_time(lambda i, dy=dy, x=x: dy[i].T @ x[i])
    return times


def _time_in_process(workspace: str | None, size: str, num_tokens: int) -> dict[str, float]:
    environment = {key: value for key, value in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}
    if workspace is not None:
        environment["CUBLAS_WORKSPACE_CONFIG"] = workspace
    command = [sys.executable, "-m", "benchmarks.products", "--child", size, "--tokens", str(num_tokens)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(size: str, num_tokens: int) -> dict[str, dict[str, float]]:
    """Time the products of a size's layer in both ways, in turns; returns us by way and product."""
    rounds = {way: [] for way in WORKSPACES}
    for _ in range(_ROUNDS):
        for way, workspace in WORKSPACES.items():
            rounds[way].append(_time_in_process(workspace, size, num_tokens))
    return {
        way: {name: statistics.median(each[name] for each in measured) for name in measured[0]}
        for way, measured in rounds.items()
    }


def layer_time(size: ModelSize, times: dict[str, float]) -> float:
    """Return the time of all products of a layer in us."""
    return sum(
        count * times[f"{kind} {rows} x {columns}"]
        for (rows, columns), count in matrices(size).items()
        for kind in ("y", "dx", "dW")
    )


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.products",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", default=["60m", "0.6b", "1.7b"], choices=SIZES, metavar="SIZE")
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro-batch (32768)")
    parser.add_argument("--child", choices=SIZES, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="products", help="name of the JSON file in --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(time_products(SIZES[options.child], options.tokens)))
        return
    check_out(options.out)
    if not torch.cuda.is_available():
        raise UserError("this machine has no GPU: the benchmark measures products on one")
    rows = []
    for size in options.sizes:
        times = measure(size, options.tokens)
        layer = {way: layer_time(SIZES[size], each) for way, each in times.items()}
        rows.append({"size": size, "layer_us": layer, "us": times})
        ratio = layer["without"] / layer["with"]
        print(f"{size}: a layer takes {layer['with']:.0f} us with a workspace, {ratio:.3f} of it without")
        for name, time in times["with"].items():
            print(f"    {name:16}  {time:7.1f} us  {times['without'][name] / time:.3f}")
    command = shlex.join(["python", "-m", "benchmarks.products", *sys.argv[1:]])
    write_result(options.name, {"command": command, "num_tokens": options.tokens, "rows": rows}, options.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
