"""Training speed of Parallax and of our softmax attention, compared with other implementations.

`python -m benchmarks.attention` checks the accuracy first and reports no speed if that fails. Then, for every
length at 32k tokens, all providers run in rotation in one process, so that clocks and temperature affect them
equally: ours, torch's softmax attention with the FlashAttention-2 and the cuDNN backend, compiled
FlexAttention (softmax), and Parallax from flash-linear-attention. Times are medians over CUDA events; the
forward saves what a backward needs. FLOPs count the causal half of each product: softmax 2 forward and 5
backward, Parallax 4 and 8, regardless of how many a kernel executes. At `--repeat-lengths` each provider
also runs alone for `--repeat-seconds`, which brings the GPU to its power limit; in rotation, kernels that
draw less power would hide that. Memory is the peak of one forward and backward above the inputs.

The authors' own kernels cannot be imported beside ours (same package name). Their time on another H100 is
scaled by the ratio of the yardstick's times here and there (FlashAttention-2; cuDNN at head width 64).
"""

import argparse
import itertools
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.attention_providers import PROVIDERS, parse_heads
from benchmarks.machine import RESULTS, write_result
from errors import run_command
from parallax import parallax_attention
from parallax.kernels import tiles
from parallax.reference import parallax_reference
from parallax.testing import Inputs, make_inputs, output_and_gradients, relative_error

BARS = {"o": 0.0026, "dq": 0.0032, "dr": 0.0032, "dk": 0.0032, "dv": 0.0032}
"""Maximum permitted relative norm errors against fp64 in bf16."""

KEY_OFFSETS = (0.0, 3.0, 8.0)

ACCURACY_LENGTHS = (tiles.SHORT, 2 * tiles.SHORT)
"""The Hopper forward has another tile and another loop for long rows."""

FLEX_LENGTHS = (4096, 16384)
"""FlexAttention takes seconds to compile per shape, so it is timed at these lengths only."""

AUTHORS_MS: dict[tuple[int, int], tuple[float, str, float]] = {
    (128, 1024): (3.67, "fa2", 2.93),
    (128, 2048): (6.09, "fa2", 4.40),
    (128, 4096): (10.97, "fa2", 7.31),
    (128, 8192): (21.5, "fa2", 13.1),
    (128, 16384): (41.2, "fa2", 24.5),
    (128, 32768): (78.3, "fa2", 48.3),
    (64, 4096): (5.54, "cudnn", 2.60),
    (64, 32768): (40.1, "cudnn", 18.4),
}
"""(head width, length) -> the authors' forward + backward in ms, a yardstick, its forward + backward in ms.

Measured with parallax-kernel 0.1.1 and the yardstick in one process on an H100: 16 query and 8 kv
heads, 32k tokens, bf16.
"""


class Shape(NamedTuple):
    """Shape of a causal attention problem of B * T tokens."""

    num_tokens: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    batch_size: int

    def tflops(self, num_products: int, time_ms: float) -> float:
        """Return the throughput of causal T x T x K products in TFLOP/s."""
        flops = num_products * self.batch_size * self.num_heads * self.num_tokens**2 * self.head_dim
        return flops / time_ms / 1e9


@dataclass
class Cell:
    """Time and memory of one provider at one shape.

    Attributes:
        provider: Name of the provider.
        shape: Shape of the problem.
        forward_ms: Median time of the forward, milliseconds.
        backward_ms: Median time of the backward, milliseconds.
        peak_mib: Peak memory above the inputs, MiB.
        rounds_ms: Times of forward and backward in each round.
        repeated_ms: Medians of forward and backward when the provider runs alone, or None.
        error: Error that the provider raised, or None.
    """

    provider: str
    shape: Shape
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    peak_mib: float = 0.0
    rounds_ms: list[tuple[float, float]] = field(default_factory=list)
    repeated_ms: tuple[float, float] | None = None
    error: str | None = None

    @property
    def sum_ms(self) -> float:
        """Time of forward and backward, milliseconds."""
        return self.forward_ms + self.backward_ms


def check_accuracy(head_dims: list[int]) -> list[dict[str, Any]]:
    """Measure, print and return errors against fp64 at `ACCURACY_LENGTHS`, 16 query and 8 kv heads.

    Raises:
        SystemExit: An error exceeds its bar, so no speed may be reported.
    """
    rows, failures = [], []
    print("| attention | T | head width | key offset | o | dQ | dR | dK | dV |\n|" + "---|" * 9)
    for num_tokens, head_dim, key_offset in itertools.product(ACCURACY_LENGTHS, head_dims, KEY_OFFSETS):
        drawn = make_inputs(
            1, num_tokens, 16, 8, head_dim, dtype=torch.bfloat16, device="cuda", key_offset=key_offset
        )
        for attention, inputs in (("Parallax", drawn), ("softmax", drawn.without_probes())):
            actual = output_and_gradients(parallax_attention, inputs)
            truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
            errors = {name: relative_error(actual[name], truth[name]) for name in truth}
            place = {"attention": attention, "num_tokens": num_tokens, "head_dim": head_dim}
            rows.append({**place, "key_offset": key_offset, **errors})
            numbers = " | ".join(f"{errors[name]:.4f}" if name in errors else "" for name in BARS)
            print(f"| {attention} | {num_tokens} | {head_dim} | {key_offset:g} | {numbers} |", flush=True)
            failures += [
                f"{name} {error:.4f} > {BARS[name]}, {attention} at T = {num_tokens}, head width {head_dim}, "
                f"key offset {key_offset:g}"
                for name, error in errors.items()
                if not error <= BARS[name]
            ]
    if failures:
        sys.exit("no speed is reported, the accuracy check failed: " + "; ".join(failures))
    return rows


class Runner:
    """One provider with its inputs at one shape.

    Args:
        name: Name of the provider.
        shape: Shape of the problem.
        inputs: Inputs; copied to the provider's layout.
    """

    def __init__(self, name: str, shape: Shape, inputs: Inputs) -> None:
        self.cell = Cell(name, shape)
        provider = PROVIDERS[name]
        tensors = inputs if provider.is_parallax else (inputs.q, inputs.k, inputs.v, inputs.do)
        if provider.heads_first:
            tensors = tuple(x.transpose(1, 2).contiguous() for x in tensors)
        *leaves, self.do = (x.detach() for x in tensors)
        self.leaves = [x.requires_grad_() for x in leaves]
        self.attend = provider.attend

    def run(self) -> list[torch.cuda.Event]:
        """Run forward and backward; return CUDA events before, between and after them."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        o = self.attend(*self.leaves)
        events[1].record()
        torch.autograd.grad(o, self.leaves, self.do)
        events[2].record()
        return events

    def warm_up(self) -> None:
        """Compile and measure peak memory, or store the error if the provider fails."""
        try:
            self.run()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            torch.cuda.synchronize()
            self.cell.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as error:  # a provider may not support a shape, or not be installed
            self.cell.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            print(f"{self.cell.provider} {self.cell.shape}: {self.cell.error}", file=sys.stderr)

    def repeat(self, seconds: float) -> None:
        """Time back-to-back runs for so many seconds; store medians of all but the first third."""
        events = [self.run() for _ in range(max(30, int(seconds * 1e3 / self.cell.sum_ms)))]
        torch.cuda.synchronize()
        times = [(a.elapsed_time(b), b.elapsed_time(c)) for a, b, c in events[len(events) // 3 :]]
        forwards, backwards = zip(*times, strict=True)
        self.cell.repeated_ms = (statistics.median(forwards), statistics.median(backwards))


def _seconds_of_one_rotation(runners: list[Runner]) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for runner in runners:
        runner.run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def measure(shape: Shape, names: list[str], seconds: float, repeat_seconds: float = 0.0) -> list[Cell]:
    """Time providers in rotation at one shape, then each alone.

    Args:
        shape: Shape of the problem.
        names: Names of the providers.
        seconds: Duration of all rounds, of which there are 5 to 30.
        repeat_seconds: Duration for which each then runs alone; 0 to skip this.
    """
    inputs = draw(shape)
    every = [Runner(name, shape, inputs) for name in names]
    for runner in every:
        runner.warm_up()
    runners = [runner for runner in every if runner.cell.error is None]
    num_rounds = max(5, min(30, int(seconds / _seconds_of_one_rotation(runners)))) if runners else 0
    flushed = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for i_round in range(num_rounds):
        taken = []
        for runner in runners[i_round % len(runners) :] + runners[: i_round % len(runners)]:
            # flush the L2 cache, and let the host run ahead of the GPU
            flushed.zero_()
            torch.cuda._sleep(4_000_000)
            taken.append((runner, runner.run()))
        torch.cuda.synchronize()
        for runner, (start, middle, end) in taken:
            runner.cell.rounds_ms.append((start.elapsed_time(middle), middle.elapsed_time(end)))
    for runner in runners:
        forwards, backwards = zip(*runner.cell.rounds_ms, strict=True)
        runner.cell.forward_ms = statistics.median(forwards)
        runner.cell.backward_ms = statistics.median(backwards)
    if repeat_seconds > 0:
        for runner in runners:
            runner.repeat(repeat_seconds)
    return [runner.cell for runner in every]


def draw(shape: Shape) -> Inputs:
    """Draw standard normal bf16 inputs on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(num_heads: int) -> Tensor:
        size = (shape.batch_size, shape.num_tokens, num_heads, shape.head_dim)
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, r, do = (normal(shape.num_heads) for _ in range(3))
    k, v = (normal(shape.num_kv_heads) for _ in range(2))
    return Inputs(q, r, k, v, do)


def authors_sum_ms(cells: dict[str, Cell]) -> float | None:
    """Estimate the time of the authors' kernels on this GPU, or return None where it was not measured."""
    shape = cells["ours"].shape
    known = AUTHORS_MS.get((shape.head_dim, shape.num_tokens))
    if known is None or (shape.num_heads, shape.num_kv_heads) != (16, 8):
        return None
    authors_ms, yardstick, yardstick_ms = known
    if yardstick not in cells or cells[yardstick].error:
        return None
    return authors_ms * cells[yardstick].sum_ms / yardstick_ms


def _row(cells: dict[str, Cell], names: list[str]) -> Iterator[str]:
    """Yield the table's cells for one shape: times, ratios, memory."""
    ours = cells["ours"]
    yield str(ours.shape.num_tokens)
    for name in names:
        cell = cells.get(name)
        if cell is None or cell.error:
            yield "" if cell is None else "does not run"
            continue
        pairs = zip(PROVIDERS[name].products, (cell.forward_ms, cell.backward_ms), strict=True)
        rates = "/".join(f"{cell.shape.tflops(*pair):.0f}" for pair in pairs)
        yield f"{cell.forward_ms:.2f} + {cell.backward_ms:.2f} = {cell.sum_ms:.2f} ({rates})"
    authors = authors_sum_ms(cells)
    yield "" if authors is None else f"{authors:.2f}"
    against = [None if authors is None else authors / ours.sum_ms]
    for name in names[1:]:
        cell = cells.get(name)
        against.append(None if cell is None or cell.error else cell.sum_ms / ours.sum_ms)
    yield " / ".join("-" if x is None else f"{x:.2f}" for x in against)
    memory = [cells[name].peak_mib if name in cells and not cells[name].error else None for name in names]
    yield " / ".join("-" if x is None else f"{x:.0f}" for x in memory)


def table(found: list[Cell]) -> str:
    """Format the Markdown tables, one per head width and number of heads."""
    lines = []
    shapes = list(dict.fromkeys(c.shape for c in found))
    kinds = dict.fromkeys((s.head_dim, s.num_heads, s.num_kv_heads) for s in shapes)
    for kind in kinds:
        here = [s for s in shapes if (s.head_dim, s.num_heads, s.num_kv_heads) == kind]
        names = [n for n in PROVIDERS if any(c.provider == n and c.shape in here for c in found)]
        peers = " / ".join(names[1:])
        lines.append(f"\nHead width {kind[0]}, {kind[1]} query and {kind[2]} kv heads, ms (TFLOP/s):\n")
        labels = [PROVIDERS[name].label for name in names]
        header = [
            "T",
            *labels,
            "authors', scaled",
            f"times ours: authors' / {peers}",
            f"MiB: {' / '.join(names)}",
        ]
        lines.append("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
        for shape in here:
            cells = {c.provider: c for c in found if c.shape == shape}
            if not cells["ours"].error:
                lines.append("| " + " | ".join(_row(cells, names)) + " |")
    return "\n".join(lines)


def repeated_table(found: list[Cell]) -> str:
    """Format the Markdown table of providers that ran alone."""
    lines = ["\n| alone, ms | T | head width | heads | forward + backward |\n|" + "---|" * 5]
    for cell in found:
        if cell.repeated_ms is not None:
            forward, backward = cell.repeated_ms
            shape = cell.shape
            lines.append(
                f"| {PROVIDERS[cell.provider].label} | {shape.num_tokens} | {shape.head_dim} | "
                f"{shape.num_heads}/{shape.num_kv_heads} | "
                f"{forward:.2f} + {backward:.2f} = {forward + backward:.2f} |"
            )
    return "\n".join(lines)


def _providers_of(shape: Shape, asked: list[str], flex_lengths: list[int]) -> list[str]:
    if shape.head_dim not in (64, 128):
        return ["ours", "ours_softmax"]
    is_flexed = shape.num_tokens in flex_lengths and shape.num_heads != shape.num_kv_heads
    return ["ours", *(n for n in asked if n != "ours" and (n != "flex" or is_flexed))]


def main() -> None:
    """Run `python -m benchmarks.attention`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [2**i for i in range(10, 16)]
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=lengths, help="tokens per row (1024 to 32768)"
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64, 96, 256], help="head widths")
    parser.add_argument("--heads", nargs="+", default=["16/8", "16/16"], help="query/kv heads (16/8 16/16)")
    parser.add_argument(
        "--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS), help="(all)"
    )
    parser.add_argument(
        "--flex-lengths",
        type=int,
        nargs="*",
        default=list(FLEX_LENGTHS),
        help="lengths at which FlexAttention is timed",
    )
    parser.add_argument("--tokens", type=int, default=32768, help="batch size times length")
    parser.add_argument(
        "--repeat-lengths",
        type=int,
        nargs="*",
        default=[4096],
        help="lengths at which each provider also runs alone",
    )
    parser.add_argument("--repeat-seconds", type=float, default=1.0, help="duration of each such run (1.0)")
    parser.add_argument("--seconds", type=float, default=0.8, help="duration of the rounds per shape (0.8)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--name", default="attention", help="name of the JSON file in --out")
    args = parser.parse_args()

    errors = check_accuracy(args.head_dims)
    found: list[Cell] = []
    for heads, head_dim, num_tokens in itertools.product(args.heads, args.head_dims, args.lengths):
        num_heads, num_kv_heads = parse_heads(heads)
        shape = Shape(num_tokens, head_dim, num_heads, num_kv_heads, max(1, args.tokens // num_tokens))
        if head_dim not in (64, 128) and num_heads == num_kv_heads:
            continue
        names = _providers_of(shape, args.providers, args.flex_lengths)
        repeat_seconds = args.repeat_seconds if num_tokens in args.repeat_lengths else 0.0
        found += measure(shape, names, args.seconds, repeat_seconds)
        print(", ".join(f"{c.provider} {c.sum_ms:.2f}" for c in found if c.shape == shape), shape, flush=True)
    print(table(found))
    print(repeated_table(found))
    cells = [asdict(c) | {"shape": c.shape._asdict()} for c in found]
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.attention", *sys.argv[1:]]),
        "accuracy": errors,
        "cells": cells,
    }
    print(write_result(args.name, result, args.out))


if __name__ == "__main__":
    sys.exit(run_command(main))
