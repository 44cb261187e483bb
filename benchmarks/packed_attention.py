"""Overhead of packed documents: our attention over packed rows compared with unpacked rows.

`python -m benchmarks.packed_attention` runs on a GPU. The kernels tile packed rows as one sequence and skip
tiles that are masked entirely, so the fair comparison is with unpacked rows of as many 64 x 64 tiles. Where
no power-of-two length has exactly that many, the time is interpolated between the two nearest lengths.
"""

import argparse
import shlex
import statistics
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import BARS
from benchmarks.attention_providers import parse_heads
from benchmarks.attention_timing import Shape, draw
from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import UserError, run_command
from parallax import parallax_attention
from parallax.reference import parallax_reference
from parallax.testing import Inputs, cu_seqlens_of, make_inputs, output_and_gradients, relative_error

TILE = 64
LENGTHS = (512, 1024, 2048, 4096)


def mixed_lengths(num_tokens: int, seed: int = 0) -> list[int]:
    """Draw document lengths like web pages': log-normal, median 500, at most 4096, with a given sum."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        drawn = int(500 * torch.randn(1, generator=generator).exp().item())
        lengths.append(min(max(drawn, 16), 4096, num_tokens - sum(lengths)))
    return lengths


def num_tiles(lengths: list[int]) -> int:
    """Count the tiles that the kernels process per head of a row packed with documents of these lengths."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    first_rows = torch.arange(0, sum(lengths), TILE)
    first_keys = starts[torch.searchsorted(starts, first_rows, right=True) - 1]
    return int((first_rows // TILE + 1 - first_keys // TILE).sum())


class Problem:
    """Inputs of one shape, packed or not, and their times.

    Args:
        num_tokens: Tokens of all rows together.
        lengths: Document lengths of one packed row; a single one is the length of unpacked rows.
        args: Command line with head_dim, heads and softmax.
    """

    def __init__(self, num_tokens: int, lengths: list[int], args: argparse.Namespace) -> None:
        is_packed = len(lengths) > 1
        row = num_tokens if is_packed else lengths[0]
        self.tiles = num_tiles(lengths) if is_packed else num_tokens // row * num_tiles(lengths)
        num_heads, num_kv_heads = parse_heads(args.heads)
        shape = Shape(row, args.head_dim, num_heads, num_kv_heads, num_tokens // row)
        inputs = Inputs(*draw(shape))
        inputs = inputs.without_probes() if args.softmax else inputs
        self.do = inputs.do
        self.arguments = inputs[:4]
        self.leaves = [x.requires_grad_() for x in inputs[:4] if x is not None]
        self.cu_seqlens: Tensor | None = None
        if is_packed:
            bounds = torch.tensor([0, *lengths]).cumsum(0)
            self.cu_seqlens = bounds.to("cuda", torch.int32)
        self.rounds_ms: list[tuple[float, float]] = []

    def run(self) -> None:
        """Time forward and backward once, with a cold L2 cache."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.empty(2**26, dtype=torch.int32, device="cuda").zero_()
        torch.cuda._sleep(4_000_000)
        events[0].record()
        o = parallax_attention(*self.arguments, cu_seqlens=self.cu_seqlens)
        events[1].record()
        torch.autograd.grad(o, self.leaves, self.do)
        events[2].record()
        torch.cuda.synchronize()
        self.rounds_ms.append((events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])))

    def median_ms(self) -> tuple[float, float]:
        """Return median times of forward and backward, without the first two rounds."""
        forward, backward = zip(*self.rounds_ms[2:], strict=True)
        return statistics.median(forward), statistics.median(backward)


def interpolate(measured: list[tuple[int, tuple[float, float]]], tiles: int) -> tuple[float, float]:
    """Interpolate the times of forward and backward linearly between the nearest numbers of tiles.

    Args:
        measured: Numbers of tiles and times in milliseconds, ascending.
        tiles: Number of tiles, between the first and the last.

    Returns:
        Times of forward and backward in milliseconds.
    """
    (low, low_ms), (high, high_ms) = next(pair for pair in pairwise(measured) if tiles <= pair[1][0])
    part = (tiles - low) / (high - low)
    forward, backward = (a + part * (b - a) for a, b in zip(low_ms, high_ms, strict=True))
    return forward, backward


def as_row(times: tuple[float, float]) -> dict[str, float]:
    """Return times of forward and backward under their keys in the result."""
    return {"forward_ms": times[0], "backward_ms": times[1]}


def check(head_dim: int, is_softmax: bool) -> float:
    """Return the largest relative error of packed results against fp64, for short and for long documents.

    The Hopper forward has a tile for each.

    Raises:
        SystemExit: An error exceeds its bar in `benchmarks.attention`, so no speed may be reported.
    """
    largest = 0.0
    for lengths in ([1, 63, 400, 1500, 36], [2500, 500]):
        inputs = make_inputs(1, sum(lengths), 4, 2, head_dim, dtype=torch.bfloat16, device="cuda")
        inputs = inputs.without_probes() if is_softmax else inputs
        cu_seqlens = cu_seqlens_of(lengths, "cuda")
        actual = output_and_gradients(parallax_attention, inputs, cu_seqlens=cu_seqlens)
        truth = output_and_gradients(parallax_reference, inputs.to(torch.float64), cu_seqlens=cu_seqlens)
        for name in truth:
            error = relative_error(actual[name], truth[name])
            if not error <= BARS[name]:
                sys.exit(
                    f"no speed is reported: error of {name} {error:.4f} > {BARS[name]}, documents {lengths}"
                )
            largest = max(largest, error)
    return largest


def main() -> None:
    """Run `python -m benchmarks.packed_attention`."""
    parser = make_parser("packed_attention", __doc__, name="packed_attention")
    parser.add_argument("--tokens", type=int, default=32768, help="batch size times length (32768)")
    parser.add_argument("--head-dim", type=int, default=128, help="head width (128)")
    parser.add_argument("--heads", default="16/8", help="query/kv heads (16/8)")
    parser.add_argument("--softmax", action="store_true", help="softmax attention, without probes")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (20)")
    args = parse(parser)

    num_tokens = args.tokens
    if num_tokens % LENGTHS[-1]:
        raise UserError(
            f"--tokens is {num_tokens}, wanted a multiple of {LENGTHS[-1]}, the longest row timed"
        )
    error = check(args.head_dim, args.softmax)
    unpacked = [Problem(num_tokens, [length], args) for length in LENGTHS]
    mixed = mixed_lengths(num_tokens)
    packed = {f"{num_tokens // n} x {n}": [n] * (num_tokens // n) for n in (1024, 4096)}
    packed[f"{len(mixed)} of mixed lengths"] = mixed
    problems = {name: Problem(num_tokens, lengths, args) for name, lengths in packed.items()}
    for _ in range(args.rounds + 2):
        for problem in (*unpacked, *problems.values()):
            problem.run()

    measured = [(problem.tiles, problem.median_ms()) for problem in unpacked]
    rows: list[dict[str, Any]] = []
    print("| documents | forward + backward, ms | unpacked rows of as many tiles, ms | packed / unpacked |")
    print("|---|---|---|---|")
    for name, problem in problems.items():
        times, expected = problem.median_ms(), interpolate(measured, problem.tiles)
        ratio = sum(times) / sum(expected)
        rows.append({"documents": packed[name], "tiles": problem.tiles, **as_row(times), "ratio": ratio})
        ours, theirs = (f"{forward:.2f} + {backward:.2f}" for forward, backward in (times, expected))
        print(f"| {name} | {ours} | {theirs} | {ratio:.3f} |")
    unpacked_rows = [
        {"length": length, "tiles": tiles, **as_row(times)}
        for length, (tiles, times) in zip(LENGTHS, measured, strict=True)
    ]
    command = shlex.join(["python", "-m", "benchmarks.packed_attention", *sys.argv[1:]])
    result = {"command": command, "error": error, "rows": rows, "unpacked": unpacked_rows}
    print(write_result(args.name, result, args.out))


if __name__ == "__main__":
    sys.exit(run_command(main))
