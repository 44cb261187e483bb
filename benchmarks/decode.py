"""Speed of decoding one token over a KV cache, compared with other implementations.

`python -m benchmarks.decode` checks the accuracy first and reports no speed if that fails. Then, for every
shape, all providers run in rotation in one process: ours (Parallax, and softmax attention with the same
kernel), torch's softmax attention with the cuDNN and the FlashAttention-2 backend, the Parallax decode of
flash-linear-attention, and the packages flash_attn and flash_attn_interface (FlashAttention-3) if installed.
Times are medians over replays of a CUDA graph, per call. Each call in a graph has its own KV cache, so that
keys and values come from memory and never from L2. Our kernels let the next one start early (programmatic
dependent launch): in the graph that is our next call, which in a model has other kernels before it. GB/s
count only keys and values. The copy rate is that of a 2 GiB copy, read and write, in the same process.

The authors' own kernel cannot be imported beside ours (same package name). Its time on another H100 is scaled
by the ratio of cuDNN's times here and there. The shapes of the paper's own table, 8 heads on an H200, are
measured too, and its numbers are printed beside ours.
"""

import shlex
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import run_command
from parallax import parallax_decode
from parallax.reference import parallax_reference
from parallax.testing import relative_error

BAR = 0.0026
"""Maximum permitted relative norm error of o against fp64 in bf16."""

COLD_BYTES = 192 << 20
"""Minimum size of all KV caches of a graph, so that none stays in L2 (50 or 60 MB) between replays."""

PEERS_US: dict[tuple[int, int, int, int], tuple[float, float]] = {
    (16, 8, 1, 128): (5.9, 4.4),
    (16, 8, 1, 1024): (8.2, 7.8),
    (16, 8, 1, 4096): (12.6, 12.6),
    (16, 8, 1, 32768): (52.1, 50.9),
    (16, 8, 16, 1024): (33.8, 26.2),
    (16, 8, 16, 4096): (100.0, 89.1),
    (16, 8, 128, 1024): (196.0, 180.0),
    (16, 8, 128, 4096): (731.0, 696.0),
    (16, 8, 1024, 128): (258.0, 188.0),
    (16, 8, 1024, 4096): (5667.0, 5481.0),
    (16, 16, 1, 4096): (17.8, 17.8),
    (16, 16, 16, 4096): (185.0, 178.0),
    (16, 16, 128, 4096): (1462.0, 1385.0),
}
"""(query heads, kv heads, batch, context) -> microseconds of the authors' CuTe kernel and cuDNN's softmax.

Measured with parallax-kernel 0.1.1 and torch 2.11 in one process on an H100: bf16, head width 128, CUDA-graph
replays.
"""

PAPER_US: dict[tuple[int, int], tuple[float, float, float]] = {
    (1, 512): (8.38, 10.64, 5.79),
    (1, 1024): (9.45, 9.10, 6.48),
    (1, 4096): (17.07, 11.90, 8.61),
    (1, 16384): (29.82, 24.46, 21.53),
    (32, 512): (27.73, 23.48, 24.02),
    (32, 1024): (99.73, 39.16, 39.55),
    (32, 4096): (384.90, 281.64, 279.96),
    (32, 16384): (1574.94, 1096.76, 1094.37),
}
"""(batch, context) -> microseconds of FlashAttention-2, FlashAttention-3 and Parallax in the paper.

From its decode table: an H200, bf16, 8 query and 8 kv heads of width 128. The paper does not state how the
times were measured, or whether keys and values came from L2.
"""

ACCURACY_CASES = (
    (16, 8, 3, 1000),
    (16, 16, 3, 1000),
    (8, 1, 3, 1000),
    (8, 8, 1, 700),
    (16, 8, 16, 1000),
    (16, 8, 100, 300),
)
"""(query heads, kv heads, batch, context): from few long sequences to many short ones."""


class Shape(NamedTuple):
    """Shape of decoding one token in each of B sequences with S keys."""

    num_heads: int
    num_kv_heads: int
    batch_size: int
    num_keys: int
    head_dim: int = 128

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in 16 bits."""
        return 4 * self.batch_size * self.num_keys * self.num_kv_heads * self.head_dim


class Operands(NamedTuple):
    """Inputs of one call: q, r `[B, 1, H, K]`, k, v `[B, S, G, K]`, lengths `[B]`."""

    q: Tensor
    r: Tensor
    k: Tensor
    v: Tensor
    cache_seqlens: Tensor


Attend = Callable[[Operands], Tensor]


def _sdpa(backend: SDPBackend, x: Operands) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _ours(x: Operands) -> Tensor:
    return parallax_decode(x.q, x.r, x.k, x.v, cache_seqlens=x.cache_seqlens)


def _ours_softmax(x: Operands) -> Tensor:
    return parallax_decode(x.q, None, x.k, x.v, cache_seqlens=x.cache_seqlens)


def _fla(x: Operands) -> Tensor:
    return import_module("fla.ops.parallax.decode").parallax_decode(x.q, x.r, x.k, x.v)


def _flash_attention(package: str, x: Operands) -> Tensor:
    decode = import_module(package).flash_attn_with_kvcache
    return decode(x.q, x.k, x.v, cache_seqlens=x.cache_seqlens, causal=True)


PROVIDERS: dict[str, Attend] = {
    "ours": _ours,
    "ours_softmax": _ours_softmax,
    "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "fa2": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "fla": _fla,
    "flash_attn": partial(_flash_attention, "flash_attn"),
    "fa3": partial(_flash_attention, "flash_attn_interface"),
}


def make_operands(shape: Shape) -> Operands:
    """Draw standard normal bf16 inputs of one call on the GPU."""
    query = (shape.batch_size, 1, shape.num_heads, shape.head_dim)
    keys = (shape.batch_size, shape.num_keys, shape.num_kv_heads, shape.head_dim)
    q, r, k, v = (torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in (query, query, keys, keys))
    lengths = torch.full((shape.batch_size,), shape.num_keys, dtype=torch.int32, device="cuda")
    return Operands(q, r, k, v, lengths)


def graph_of(attend: Attend, shape: Shape, num_calls: int | None = None) -> tuple[torch.cuda.CUDAGraph, int]:
    """Capture calls with separate KV caches in a CUDA graph.

    Args:
        attend: Provider to call.
        shape: Shape of each call.
        num_calls: Number of calls; None for as many as take `COLD_BYTES`.

    Returns:
        The graph and its number of calls.
    """
    num_calls = num_calls or max(1, -(-COLD_BYTES // shape.cache_bytes))
    operands = [make_operands(shape) for _ in range(num_calls)]
    for x in operands[:2]:
        attend(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [attend(x) for x in operands]
    graph.operands, graph.outputs = operands, outputs  # pyrefly: ignore [missing-attribute]
    return graph, num_calls


def time_graphs(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Time the graphs by replaying them in rotation.

    Args:
        graphs: Graphs from graph_of, by provider.
        rounds: Number of replays of each.

    Returns:
        Median time per call in microseconds, by provider.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, num_calls) in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # the same clocks and L2 contents for all providers
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times[name].append(1000 * start.elapsed_time(stop) / num_calls)
    return {name: statistics.median(values) for name, values in times.items()}


def check_accuracy() -> dict[str, float]:
    """Return relative errors of both of ours against fp64 by case, over the first three sequences of each.

    Raises:
        RuntimeError: An error exceeds BAR, so no speed may be reported.
    """
    errors = {}
    for heads, kv_heads, batch, num_keys in ACCURACY_CASES:
        for offset in (0.0, 3.0):
            x = make_operands(Shape(heads, kv_heads, batch, num_keys))
            x.k.add_(offset * torch.randn_like(x.k[:1, :1]))
            x.cache_seqlens[1:2] = num_keys // 2 + 17
            full = torch.zeros(2, 1, num_keys, heads, 128, dtype=torch.float64, device="cuda")
            got, got_softmax = _ours(x), _ours_softmax(x)
            worst = 0.0
            for row, length in enumerate(x.cache_seqlens[:3].tolist()):
                q, r = full[:, :, :length].clone()
                q[0, -1], r[0, -1] = x.q[row, 0].double(), x.r[row, 0].double()
                k, v = (t[row : row + 1, :length].double() for t in (x.k, x.v))
                for actual, probe in ((got, r), (got_softmax, None)):
                    truth = parallax_reference(q, probe, k, v)[0, -1]
                    worst = max(worst, float(relative_error(actual[row, 0], truth)))
            errors[f"{heads}/{kv_heads} heads, {batch} x {num_keys}, key offset {offset:g}"] = worst
    wrong = {name: error for name, error in errors.items() if not error <= BAR}
    if wrong:
        raise RuntimeError(f"relative norm error above {BAR}: {wrong}; no speed is reported")
    return errors


def copy_rate() -> float:
    """Measure the bandwidth of a 2 GiB copy in GB/s, read and write counted."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return 2 * source.numel() / statistics.median(times) / 1e6


def measure(shape: Shape, names: list[str], rounds: int) -> dict[str, Any]:
    """Time providers at one shape.

    Args:
        shape: Shape of each call.
        names: Names in PROVIDERS.
        rounds: Number of replays of each.

    Returns:
        Microseconds and GB/s by provider, and the errors of providers that fail.
    """
    graphs, failures = {}, {}
    for name in names:
        try:
            graphs[name] = graph_of(PROVIDERS[name], shape)
        except (RuntimeError, ImportError, ValueError) as error:
            failures[name] = str(error).splitlines()[0][:200]
            torch.cuda.synchronize()
    times = time_graphs(graphs, rounds)
    row: dict[str, Any] = {**shape._asdict(), "us": times, "failures": failures}
    row["gb_per_s"] = {name: shape.cache_bytes / us / 1e3 for name, us in times.items()}
    peers = PEERS_US.get(shape[:4])
    if peers and "cudnn" in times and shape.head_dim == 128:
        row["authors_scaled_us"] = peers[0] * times["cudnn"] / peers[1]
    paper = PAPER_US.get((shape.batch_size, shape.num_keys))
    if paper and shape[:2] == (8, 8) and shape.head_dim == 128:
        row["paper_us"] = dict(zip(("fa2", "fa3", "parallax"), paper, strict=True))
    del graphs
    torch.cuda.empty_cache()
    return row


def print_table(rows: list[dict[str, Any]], names: list[str]) -> None:
    """Print times in microseconds and ratios, with the paper's times where it has the shape."""
    names = [*names, "authors_scaled"]
    last = ["ours GB/s", "cudnn / ours", "ours / ours_softmax", "paper: fa2 / fa3 / parallax"]
    print("| heads | batch | context | width | " + " | ".join([*names, *last]) + " |")
    print("|---" * (len(names) + 8) + "|")
    for row in rows:
        times = [row["us"].get(n) for n in names[:-1]] + [row.get("authors_scaled_us")]
        cells = ["" if us is None else f"{us:.{2 if us < 30 else 1}f}" for us in times]
        softmax = row["us"].get("ours_softmax", float("nan"))
        cells.append(f"{row['gb_per_s']['ours']:.0f}" if "ours" in row["us"] else "")
        cells.append(f"{row['us'].get('cudnn', float('nan')) / row['us'].get('ours', float('nan')):.3f}")
        cells.append(f"{row['us'].get('ours', float('nan')) / softmax:.3f}")
        cells.append(" / ".join(f"{us:g}" for us in row.get("paper_us", {}).values()))
        sizes = f"{row['num_heads']}/{row['num_kv_heads']} | {row['batch_size']} | {row['num_keys']}"
        print(f"| {sizes} | {row['head_dim']} | {' | '.join(cells)} |")


def main() -> None:
    """Run `python -m benchmarks.decode`."""
    parser = make_parser("decode", __doc__, name="decode")
    parser.add_argument("--rounds", type=int, default=15, help="graph replays per provider (15)")
    parser.add_argument(
        "--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS), help="(all)"
    )
    options = parse(parser)
    errors = check_accuracy()
    shapes = [*(Shape(*key) for key in PEERS_US), Shape(16, 8, 16, 4096, 64), Shape(16, 8, 128, 4096, 64)]
    shapes += [Shape(8, 8, *key) for key in PAPER_US]
    rate = copy_rate()
    rows = [measure(shape, options.providers, options.rounds) for shape in shapes]
    command = "python -m benchmarks.decode " + shlex.join(sys.argv[1:])
    result = {"command": command.strip(), "errors": errors, "copy_gb_per_s": rate, "rows": rows}
    print("wrote", write_result(options.name, result, options.out))
    print(f"copy {rate:.0f} GB/s; errors {errors}")
    # packages that are not installed have no column
    print_table(rows, [n for n in options.providers if any(n in row["us"] for row in rows)])


if __name__ == "__main__":
    sys.exit(run_command(main))
