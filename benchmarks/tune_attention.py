"""Times candidate tiles of the Parallax kernels and prints the table of `parallax.kernels.tiles`.

`python -m benchmarks.tune_attention` first checks the kernels against fp64, with and without their numerical
corrections, then times every candidate at 32k tokens (T = 4096, 16 query / 8 kv heads, bf16) and writes the
raw timings. A candidate whose result departs from the first one's is marked wrong. FLOPs count the causal
half of each product: 4 forward, 5 for dQ and dR, 6 for dK and dV.
"""

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from benchmarks.machine import RESULTS, write_result
from parallax.kernels import backward, forward
from parallax.kernels.common import Mask
from parallax.kernels.tiles import KernelName, Tile
from parallax.reference import parallax_reference
from parallax.testing import Inputs, make_inputs, output_and_gradients, relative_error

NUM_HEADS, NUM_KV_HEADS = 16, 8
PRODUCTS: dict[KernelName, int] = {"forward": 4, "dqdr": 5, "dkdv": 6}
"""Tile products of each kernel."""


@dataclass
class Candidate:
    """One way to run one kernel.

    Attributes:
        kernel: Which.
        head_dim: K.
        tile: How it is cut.
        options: Further arguments of the launcher.
        times_ms: One median a round, milliseconds.
        deviation: Relative difference from the kernel's first candidate.
        error: Why it did not run.
    """

    kernel: KernelName
    head_dim: int
    tile: Tile
    options: dict[str, Any] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)
    deviation: float = 0.0
    error: str | None = None

    @property
    def label(self) -> str:
        """The candidate in words."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.kernel} {self.head_dim} {tuple(self.tile)} {options}".strip()

    @property
    def time_ms(self) -> float:
        """The best round; infinite if it did not run."""
        return min(self.times_ms, default=float("inf"))


def candidates(head_dims: list[int], kernels: list[str]) -> list[Candidate]:
    """Return what to try; the first of a kernel is the one that its variants change."""
    found = [*_forward_candidates(), *_dqdr_candidates(), *_dkdv_candidates()]
    return [c for c in found if c.head_dim in head_dims and c.kernel in kernels]


def _forward_candidates() -> Iterator[Candidate]:
    tiles = {
        128: [
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 32, 4, 2),
            (64, 32, 4, 3),
            (128, 64, 8, 2),
            (128, 64, 8, 3),
        ],
        64: [
            *itertools.product((64,), (64,), (4,), (2, 3, 4)),
            *itertools.product((128,), (64,), (8,), (2, 3)),
            *[(64, 32, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2), (128, 128, 8, 2), (128, 32, 8, 4)],
        ],
        256: [(64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 3)],
    }
    for head_dim, shapes in tiles.items():
        yield from (Candidate("forward", head_dim, Tile(*shape)) for shape in shapes)
        base = partial(Candidate, "forward", head_dim, Tile(*shapes[0]))
        yield base({"save_vbar": False})
        yield base({"is_centred": False})
        yield base({"section": 2})
        yield base({"section": 1 << 20})
        yield base({"use_descriptors": False})


def _dqdr_candidates() -> Iterator[Candidate]:
    tiles = {
        128: [
            (64, 64, 4, 2),
            (64, 32, 4, 2),
            (64, 32, 4, 3),
            (128, 64, 8, 2),
            (128, 64, 8, 1),
            (128, 32, 8, 3),
        ],
        64: [
            *itertools.product((64,), (64,), (4,), (2, 3)),
            *itertools.product((128,), (64,), (8,), (2, 3)),
            *[(64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3)],
        ],
        256: [(64, 32, 8, 2), (64, 16, 8, 2), (64, 16, 8, 3)],
    }
    for head_dim, shapes in tiles.items():
        yield from (Candidate("dqdr", head_dim, Tile(*shape)) for shape in shapes)
        base = partial(Candidate, "dqdr", head_dim, Tile(*shapes[0]))
        yield base({"is_corrected": False})
        yield base({"section": 2})
        yield base({"section": 1 << 20})
        yield base({"use_descriptors": False})


def _dkdv_candidates() -> Iterator[Candidate]:
    shapes = {
        128: [
            (32, 64, 4, 2),
            (32, 64, 4, 3),
            (64, 64, 4, 2),
            (32, 128, 8, 2),
            (32, 128, 8, 3),
            (64, 128, 8, 2),
        ],
        64: [
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (32, 64, 4, 2),
            (32, 64, 4, 3),
            (64, 128, 8, 2),
            (32, 128, 8, 3),
        ],
        256: [(32, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 3)],
    }
    for head_dim, tiles in shapes.items():
        in_registers = {64: (0, 1, 2), 128: (0, 1), 256: (0,)}[head_dim]
        for shape, registers, from_rows in itertools.product(tiles, in_registers, (True, False)):
            yield Candidate(
                "dkdv", head_dim, Tile(*shape, registers), {} if from_rows else {"from_rows": False}
            )
        base = partial(Candidate, "dkdv", head_dim, Tile(*tiles[0], in_registers[-1]))
        yield base({"section": 1})
        yield base({"section": 1 << 20})
        yield base({"use_descriptors": False})


class Problem:
    """Inputs of one head width, and what the backward kernels need of the forward."""

    def __init__(self, head_dim: int, num_tokens: int, batch_size: int, device: str = "cuda") -> None:
        """Draw the inputs and run the forward pass."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(num_heads: int) -> Tensor:
            shape = (batch_size, num_tokens, num_heads, head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        q, r, do = (normal(NUM_HEADS) for _ in range(3))
        k, v = (normal(NUM_KV_HEADS) for _ in range(2))
        self.operands = backward.Operands(q, r, k, v, do)
        self.scale = head_dim**-0.5
        self.mask = Mask(None, None, None)
        self.o, self.vbar, self.lse, self.tbar = forward.forward(
            q, r, k, v, None, self.scale, None, save_vbar=True
        )
        self.rows = backward.query_gradients(
            self.operands, self.o, self.vbar, self.lse, self.tbar, self.mask, self.scale
        )[2]

    def launch(self, candidate: Candidate) -> tuple[Tensor, ...]:
        """Run a candidate; return its results."""
        options: dict[str, Any] = {"tile": candidate.tile, **candidate.options}
        if candidate.kernel == "forward":
            options = {"save_vbar": True, **options}
            return forward.forward(*self.operands[:4], None, self.scale, None, **options)[:1]
        if candidate.kernel == "dqdr":
            saved = (self.o, self.vbar, self.lse, self.tbar)
            return backward.query_gradients(self.operands, *saved, self.mask, self.scale, **options)[:2]
        return backward.key_gradients(self.operands, self.rows, self.mask, self.scale, **options)


def _compile(candidate: Candidate) -> None:
    try:
        Problem(candidate.head_dim, 128, 1).launch(candidate)
    except Exception as error:  # what does not compile is reported when it is timed
        print(f"{candidate.label}: {type(error).__name__}", file=sys.stderr)


def compile_all(found: list[Candidate], num_workers: int) -> None:
    """Fill Triton's cache in parallel; the kernels do not depend on the length."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        list(pool.map(_compile, found))


def _median_ms(run: Callable[[], object]) -> float:
    median = do_bench(run, warmup=15, rep=60, return_mode="median")
    assert isinstance(median, float)
    return median


def time_all(found: list[Candidate], num_tokens: int, batch_size: int, num_rounds: int) -> None:
    """Fill in times and deviations, round by round over all candidates of a head width."""
    for head_dim in sorted({c.head_dim for c in found}):
        problem = Problem(head_dim, num_tokens, batch_size)
        group = [c for c in found if c.head_dim == head_dim]
        first: dict[str, tuple[Tensor, ...]] = {}
        for candidate in group:
            try:
                results = problem.launch(candidate)
                truth = first.setdefault(candidate.kernel, results)
                candidate.deviation = max(relative_error(*pair) for pair in zip(results, truth, strict=True))
            except Exception as error:  # a candidate may ask for more than the GPU has
                candidate.error = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        for _ in range(num_rounds):
            for candidate in group:
                if candidate.error is None:
                    run = partial(problem.launch, candidate)
                    candidate.times_ms.append(_median_ms(run))
        del problem, first


def accuracy(head_dim: int, is_centred: bool, is_corrected: bool, key_offset: float) -> dict[str, float]:
    """Return relative errors against fp64 at T = 1024."""
    inputs = make_inputs(
        1, 1024, NUM_HEADS, NUM_KV_HEADS, head_dim, dtype=torch.bfloat16, device="cuda", key_offset=key_offset
    )
    actual = _run(inputs, is_centred, is_corrected)
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
    return {name: relative_error(actual[name], truth[name]) for name in truth}


def _run(inputs: Inputs, is_centred: bool, is_corrected: bool) -> dict[str, Tensor]:
    scale = inputs.q.shape[-1] ** -0.5
    saved = forward.forward(*inputs[:4], None, scale, None, save_vbar=True, is_centred=is_centred)
    operands, mask = backward.Operands(*inputs), Mask(None, None, None)
    dq, dr, rows = backward.query_gradients(operands, *saved, mask, scale, is_corrected=is_corrected)
    dk, dv = backward.key_gradients(operands, rows, mask, scale)
    return {"o": saved[0], "dq": dq, "dr": dr, "dk": dk, "dv": dv}


def check_accuracy(head_dims: list[int]) -> list[dict[str, Any]]:
    """Print and return the accuracy table."""
    rows = []
    print("| head width | key offset | corrections | o | dQ | dR | dK | dV |\n|" + "---|" * 8)
    for head_dim, key_offset, is_on in itertools.product(head_dims, (0.0, 3.0, 8.0), (True, False)):
        errors = accuracy(head_dim, is_on, is_on, key_offset)
        rows.append({"head_dim": head_dim, "key_offset": key_offset, "corrections": is_on, **errors})
        numbers = " | ".join(f"{x:.5f}" for x in errors.values())
        print(f"| {head_dim} | {key_offset:g} | {'on' if is_on else 'off'} | {numbers} |", flush=True)
    return rows


def report(found: list[Candidate], num_tokens: int, batch_size: int) -> None:
    """Print all candidates, the fastest of each kernel first."""
    for (kernel, head_dim), group in itertools.groupby(found, key=lambda c: (c.kernel, c.head_dim)):
        flops = PRODUCTS[kernel] * batch_size * NUM_HEADS * num_tokens**2 * head_dim
        print(f"\n{kernel}, head width {head_dim}: (block_t, block_s, warps, stages, in_registers)")
        for c in sorted(group, key=lambda c: c.time_ms):
            times = " ".join(f"{t:.3f}" for t in c.times_ms)
            rate = f"{flops / c.time_ms / 1e9:4.0f} TFLOP/s" if c.times_ms else c.error
            wrong = f" WRONG by {c.deviation:.1e}" if not c.deviation < 0.02 else ""
            print(f"  {c.label:72s} {times} ms {rate}{wrong}")


def main() -> None:
    """Check, compile, time, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--kernels", nargs="+", default=list(PRODUCTS))
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="tune_attention")
    args = parser.parse_args()

    found = candidates(args.head_dims, args.kernels)
    compile_all(found, args.workers)
    errors = check_accuracy(args.head_dims)
    time_all(found, args.num_tokens, args.batch_size, args.rounds)
    report(found, args.num_tokens, args.batch_size)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / _median_ms(lambda: x @ x) / 1e9
    print(
        f"\n8192^3 bf16 product: {rate:.0f} TFLOP/s; triton {triton.__version__}, torch {torch.__version__}"
    )
    path = write_result(
        args.name,
        {
            "command": " ".join(sys.argv),
            "num_tokens": args.num_tokens,
            "batch_size": args.batch_size,
            "matmul_tflops": rate,
            "accuracy": errors,
            "candidates": [asdict(c) for c in found],
        },
        args.out,
    )
    print(path)


if __name__ == "__main__":
    main()
