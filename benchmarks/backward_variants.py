"""Cost of alternative backward kernels, beside the backward kernels used in training.

(a) Two passes, dQ/dR and dK/dV, with 11 tile products: `parallax.kernels.backward`, as in training.
(b) One pass with 8 products: a program owns a tile of keys, keeps its dK and dV, and adds K^T G^T and K^T U^T
    to dQ and dR in fp32 buffers [B, H, K, T], by TMA reductions ("tma") or atomics. The time includes the row
    constants and zeros before it and the conversion after it. It leaves out (13), which favours it. Its order
    of additions is not fixed, so its results are not bit-identical; a fixed order would cost more.
(c) Two passes with stacked operands: [G; U] K as one product with twice the rows, [G^T U^T] [Q; R] as one
    with twice the inner length. Triton joins and splits tiles in registers, not in shared memory; it joins G
    and U there without an exchange between threads. Q and R are one tensor [2, B, T, H, K], of which one
    descriptor loads 2 BT rows; S and T are one product too. The ratio to (a) excludes the copy into that
    tensor, which a model could write itself, and the row constants, which (a) computes with dQ/dR.
    [Q; R] K^T in dQ/dR is not tried: with 4 warps it spills 270 bytes per thread.

Predicted for B = 8, T = 4096, 16 query / 8 kv heads, width 128 on one H100: (b) saves 3 of 11 products, at
most 1.2 ms, and adds 17 GB of memory traffic with tiles of 64 keys, 7 ms at 2.4 TB/s, half of that with 128
keys, and 0.6 ms before and after. (c) saves neither products nor shared memory reads: the tensor cores read
the right operand again for every 64 rows of the left one.

`python -m benchmarks.backward_variants` compares each gradient with fp64 (T = 1024) and times
the accurate variants in rotating order: medians over CUDA events of each step, with a cold L2 cache before
the first. T is a multiple of 128, K is 64 or 128; causal, without windows or packed documents. On the CPU, in
fp32, with atomics for "tma": `TRITON_INTERPRET=1 python -m benchmarks.backward_variants --check`.
"""

import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.attention import BARS
from benchmarks.backward_variant_kernels import (
    constants_kernel,
    convert_kernel,
    keys_kernel,
    queries_kernel,
)
from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import run_command
from parallax.kernels import backward, forward
from parallax.kernels.addressing import Mask, describe, heads_per_section
from parallax.kernels.tiles import Tile
from parallax.reference import parallax_reference
from parallax.testing import Inputs, make_inputs, output_and_gradients, relative_error

Gradients = dict[str, Tensor]


class Problem:
    """Inputs of a backward pass, and the tensors that the forward pass saves for it."""

    def __init__(self, inputs: Inputs) -> None:
        self.operands = backward.Operands(*inputs)
        batch_size, self.num_tokens, self.num_heads, self.head_dim = inputs.q.shape
        self.num_programs = batch_size * self.num_heads
        self.scale, self.mask = self.head_dim**-0.5, Mask(None, None, None)
        self.saved = forward.forward(*inputs[:4], None, self.scale, None, save_vbar=True)
        self.rows = self.constants()

    def launch_over_rows(self, kernel: Any, *arguments: object) -> None:
        """Launch a kernel with one program per 64 rows of each head."""
        grid = self.num_tokens // 64, self.num_programs
        kernel[grid](*arguments, self.num_tokens, self.scale, H=self.num_heads, K=self.head_dim, BT=64)

    def constants(self) -> Tensor:
        """Compute the row constants `[B * H, 4, T]`, fp32."""
        do = self.operands.do
        rows = torch.empty(self.num_programs, 4, self.num_tokens, dtype=torch.float32, device=do.device)
        self.launch_over_rows(constants_kernel, do, *self.saved, rows, do.stride()[:3])
        return rows

    def launch(
        self, kernel: Any, tile: Tile, rows: Tensor, q: object = None, *buffers: object, **option: str
    ) -> tuple[Tensor, Tensor]:
        """Launch a kernel and return dk, dv or dq, dr; q replaces the descriptor of Q if given."""
        is_keys = kernel is keys_kernel
        x, block = (self.operands.k, tile.block_s) if is_keys else (self.operands.q, tile.block_t)
        gradients = torch.empty_like(x), torch.empty_like(x)
        described = self.operands.described(tile)
        num_programs = x.shape[0] * x.shape[2]
        group = self.num_heads // self.operands.k.shape[2]
        num_streamed, unit = (3 * group, 1) if is_keys else (2, group)
        section = heads_per_section(num_programs, unit, num_streamed * x[0, :, 0].nbytes)
        kernel[(self.num_tokens // block * num_programs,)](
            q or described[0], *described[1:], TensorDescriptor.from_tensor(rows, [1, 1, tile.block_t]),
            *buffers, *(describe(g, block, self.head_dim) for g in gradients), self.num_tokens, num_programs,
            section, self.scale, H=self.num_heads, G=self.operands.k.shape[2], K=self.head_dim,
            BT=tile.block_t, BS=tile.block_s, num_warps=tile.num_warps, num_stages=tile.num_stages, **option,
        )  # fmt: skip
        return gradients


def _two_passes(p: Problem, tile: Tile, option: str, out: Gradients) -> Iterator[str]:
    out["dq"], out["dr"], rows = backward.query_gradients(p.operands, *p.saved, p.mask, p.scale)
    yield "dQ/dR"
    out["dk"], out["dv"] = backward.key_gradients(p.operands, rows, p.mask, p.scale)
    yield "dK/dV"


def _one_pass(p: Problem, tile: Tile, option: str, out: Gradients) -> Iterator[str]:
    rows = p.constants()
    yield "constants"
    sums = [rows.new_zeros(p.num_programs * p.head_dim, p.num_tokens) for _ in range(2)]
    yield "zeros"
    described = [TensorDescriptor.from_tensor(x, [p.head_dim, tile.block_t]) for x in sums]
    buffers = described if option == "tma" else sums
    out["dk"], out["dv"] = p.launch(keys_kernel, tile, rows, None, *buffers, OPTION=option)
    yield "one pass"
    for name, x in zip(("dq", "dr"), sums, strict=True):
        out[name] = torch.empty_like(p.operands.q)
        p.launch_over_rows(convert_kernel, x, describe(out[name], 64, p.head_dim))
    yield "conversion"


def _stacked_dqdr(p: Problem, tile: Tile, option: str, out: Gradients) -> Iterator[str]:
    out["dq"], out["dr"] = p.launch(queries_kernel, tile, p.rows)
    yield "dQ/dR"


def _stacked_dkdv(p: Problem, tile: Tile, option: str, out: Gradients) -> Iterator[str]:
    qr = torch.stack([x for x in p.operands[:2] if x is not None])
    yield "copy"
    size, strides = ([x[i] for i in (1, 3, 0, 2, 4)] for x in (qr.shape, qr.stride()))
    queries = TensorDescriptor(qr, size, strides, [1, 1, 2, tile.block_t, p.head_dim])
    out["dk"], out["dv"] = p.launch(keys_kernel, tile, p.rows, queries, None, None, OPTION=option)
    yield "dK/dV"


VARIANTS = {"(a)": _two_passes, "(b)": _one_pass, "(c) dQ/dR": _stacked_dqdr, "(c) dK/dV": _stacked_dkdv}

CANDIDATES: list[tuple[str, str, tuple[int, int, int, int]]] = [
    ("(a)", "", (0, 0, 0, 0)),
    ("(b)", "tma", (32, 64, 4, 2)),
    ("(b)", "tma", (64, 64, 8, 2)),
    ("(b)", "tma", (32, 128, 8, 2)),
    ("(b)", "tma", (64, 128, 8, 2)),
    ("(b)", "atomics", (32, 64, 4, 2)),
    ("(b)", "atomics", (32, 128, 8, 2)),
    ("(c) dQ/dR", "", (64, 64, 4, 2)),
    ("(c) dK/dV", "", (32, 64, 4, 3)),
    ("(c) dK/dV", "K in registers", (32, 64, 4, 3)),
]
"""Variant, option, tile (queries, keys, warps, stages; (a) uses tiles.py). 64 x 128 spills 216 bytes."""


@dataclass
class Candidate:
    """Result of one of `CANDIDATES`.

    Attributes:
        way: Key of `VARIANTS`.
        option: How dQ and dR are accumulated, or where K is kept.
        tile: Tile sizes.
        errors: Error of each gradient relative to fp64.
        rounds_ms: Milliseconds of each step in each round.
        steps_ms: Median milliseconds of each step.
        refused: Why the candidate is not timed, or empty.
    """

    way: str
    option: str
    tile: Tile
    errors: dict[str, float] = field(default_factory=dict)
    rounds_ms: dict[str, list[float]] = field(default_factory=dict)
    steps_ms: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    def compare(self, problem: Problem, truth: Gradients, bounds: dict[str, float]) -> None:
        """Compute the errors; refuse a candidate that does not run or exceeds an error bound."""
        out: Gradients = {}
        try:
            list(VARIANTS[self.way](problem, self.tile, self.option, out))
            self.errors = {name: relative_error(x, truth[name]) for name, x in sorted(out.items())}
        except Exception as error:  # a candidate may need more shared memory or registers than the GPU has
            self.refused = f"refused, {type(error).__name__}: {str(error)[-150:]}".replace("\n", " ")
        if not all(error <= bounds[name] for name, error in self.errors.items()):
            self.refused = "refused, inaccurate"


def measure(found: list[Candidate], problem: Problem, num_rounds: int = 20) -> None:
    """Time the steps of all candidates, in an order that rotates between rounds."""
    flushed = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for i_round in range(num_rounds):
        for c in found[i_round % len(found) :] + found[: i_round % len(found)]:
            # a cold L2 cache, and a busy GPU while the host queues the kernels
            flushed.zero_()
            torch.cuda._sleep(4_000_000)
            events = [("", torch.cuda.Event(enable_timing=True))]
            events[0][1].record()
            for name in VARIANTS[c.way](problem, c.tile, c.option, {}):
                events.append((name, torch.cuda.Event(enable_timing=True)))
                events[-1][1].record()
            torch.cuda.synchronize()
            for (_, before), (name, after) in pairwise(events):
                c.rounds_ms.setdefault(name, []).append(before.elapsed_time(after))
    for c in found:
        c.steps_ms = {name: statistics.median(times) for name, times in c.rounds_ms.items()}


def format_table(found: list[Candidate]) -> str:
    """Format a Markdown table, with the ratio of (b) to all of (a) and of each pass of (c) to that of (a)."""
    lines = ["| variant, queries, keys, warps, stages | ms | sum | times (a) | errors |\n|" + "---|" * 5]
    baseline = found[0].steps_ms
    for c in found:
        pairs = [
            (x, baseline.get(name, 0.0))
            for name, x in c.steps_ms.items()
            if c.way == "(b)" or name in baseline
        ]
        base = sum(baseline.values()) if c.way == "(b)" else sum(x for _, x in pairs)
        ratio = f"{sum(x for x, _ in pairs) / base:.2f}" if base and pairs else ""
        steps = " + ".join(f"{name} {x:.2f}" for name, x in c.steps_ms.items()) or c.refused
        errors = ", ".join(f"{name} {x:.1e}" for name, x in c.errors.items())
        label = f"{c.way} {c.option} {c.tile[:4]}" if any(c.tile[:4]) else c.way
        total = sum(c.steps_ms.values())
        lines.append(f"| {label} | {steps} | {total:.2f} | {ratio} | {errors} |")
    return "\n".join(lines)


def main() -> int:
    """Run `python -m benchmarks.backward_variants`; return 1 if --check refuses a candidate."""
    parser = make_parser("backward_variants", __doc__, name="backward_variants")
    parser.add_argument("--check", action="store_true", help="only check the gradients, in fp32 on the CPU")
    parser.add_argument(
        "--shape", type=int, nargs=5, default=[8, 4096, 16, 8, 128], help="B T H G K (8 4096 16 8 128)"
    )
    args = parse(parser)
    found = [Candidate(way, option, Tile(*tile)) for way, option, tile in CANDIDATES]
    small, dtype, device, bounds = (1, 1024, *args.shape[2:]), torch.bfloat16, "cuda", BARS
    if args.check:
        small, dtype, device, bounds = (2, 256, 4, 2, 64), torch.float32, "cpu", dict.fromkeys(BARS, 1e-5)
        found = [Candidate(c.way, c.option.replace("tma", "atomics"), c.tile) for c in found]
    inputs = make_inputs(*small, dtype=dtype, device=device)
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
    problem = Problem(inputs)
    for c in found:
        c.compare(problem, truth, bounds)
        print(c.way, c.option, c.tile[:4], c.errors, c.refused, file=sys.stderr, flush=True)
    if args.check:
        return int(any(c.refused for c in found))
    problem = Problem(make_inputs(*args.shape, dtype=dtype, device=device))
    measure([c for c in found if not c.refused], problem)
    print(format_table(found))
    command = shlex.join(["python", "-m", "benchmarks.backward_variants", *sys.argv[1:]])
    result = {"command": command, "shape": args.shape, "candidates": [asdict(c) for c in found]}
    print(write_result(args.name, result, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
