"""Tuning of the tiles of the Parallax kernels in parallax/kernels/tiles.py.

`python -m benchmarks.tune_attention` first measures the error of the kernels against fp64, with and without
their numerical corrections, then times all candidates at 32k tokens (T = 4096, 16 query / 8 kv heads, bf16),
writes the raw times and prints the entries of the table. A candidate whose result differs from the first
one's is marked wrong. FLOPs count the causal half of each product: 4 forward, 5 for dQ and dR, 6 for dK and
dV. The fastest portable tile of each kernel is then timed with other options, for example uncorrected. Heads
of width 8 have short rows: `--head-dims 8 --num-tokens 127 --batch-size 768 --num-kv-heads 16`.
"""

import itertools
import multiprocessing
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import run_command
from parallax.kernels import backward, forward
from parallax.kernels.addressing import Mask
from parallax.kernels.tiles import KernelName, Tile
from parallax.reference import parallax_reference
from parallax.testing import Inputs, make_inputs, output_and_gradients, relative_error

NUM_HEADS = 16
PRODUCTS: dict[KernelName, int] = {"forward": 4, "dqdr": 5, "dkdv": 6}
"""Products per tile of each kernel."""


@dataclass
class Candidate:
    """One tile of one kernel, with its times.

    Attributes:
        kernel: Name of the kernel.
        head_dim: Head width K.
        tile: Tile to time.
        options: Further arguments of the launcher.
        times_ms: Median time per round, milliseconds.
        deviation: Relative difference from the result of the kernel's first candidate.
        error: Error that it raised, or None.
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
        """Kernel, head width, tile and options as text."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.kernel} {self.head_dim} {tuple(self.tile)} {options}".strip()

    @property
    def time_ms(self) -> float:
        """Time of the fastest round, milliseconds; infinite if it did not run."""
        return min(self.times_ms, default=float("inf"))

    @property
    def is_right(self) -> bool:
        """Whether it ran and its result matches that of the kernel's first candidate."""
        return bool(self.times_ms) and self.deviation < 0.02


TILES: dict[tuple[KernelName, int], list[tuple[Any, ...]]] = {
    ("forward", 8): [
        (64, 64, 4, 3),
        (64, 64, 4, 2, 0, 4),
        (32, 64, 2, 1),
        (64, 64, 4, 1),
        (64, 64, 4, 3, 0, 8, False, False, False),
    ],
    ("dqdr", 8): [
        (64, 64, 4, 3, 2),
        (64, 64, 4, 2, 0, 4),
        (64, 32, 4, 1, 0, 4),
        (32, 32, 2, 1, 0, 4),
        (64, 32, 4, 1, 0, 4, False, False, False),
    ],
    ("dkdv", 8): [
        (64, 64, 4, 3),
        (32, 32, 2, 1),
        (32, 64, 4, 1),
        (32, 64, 4, 1, 0, 8, False, False, False),
        (32, 128, 4, 1, 0, 8, False, False, False),
    ],
    ("forward", 64): [
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3, 0, 1),
        (64, 64, 4, 3, 0, 4),
        (128, 64, 8, 3),
    ],
    ("dqdr", 64): [
        (64, 64, 4, 3),
        (64, 64, 4, 3, 1),
        (64, 64, 4, 3, 2),
        (64, 64, 4, 3, 2, 1),
        (64, 64, 4, 3, 2, 4),
        (64, 32, 4, 3),
        (128, 64, 4, 4, 1, 4, True),
    ],
    ("dkdv", 64): [
        (64, 64, 4, 3),
        (64, 64, 4, 3, 1),
        (64, 64, 4, 2),
        (32, 64, 4, 3),
        (64, 128, 4, 4, 1, 8, True),
    ],
    ("forward", 96): [(64, 64, 4, 2), (64, 64, 4, 3, 1), (128, 64, 4, 3, 0, 4, True)],
    ("dqdr", 96): [(64, 64, 4, 2), (64, 64, 4, 2, 0, 4), (64, 32, 4, 3, 1)],
    ("dkdv", 96): [(32, 64, 4, 3, 1), (32, 64, 4, 3), (32, 128, 4, 4, 1, 8, True)],
    ("forward", 128): [
        (64, 64, 4, 2),
        (64, 64, 4, 3, 1),
        (64, 64, 4, 2, 0, 1),
        (64, 64, 4, 2, 0, 4),
        (128, 64, 8, 3),
        (128, 64, 4, 3, 0, 4, True),
    ],
    ("dqdr", 128): [
        (64, 64, 4, 2),
        (64, 64, 4, 2, 0, 1),
        (64, 64, 4, 2, 0, 4),
        (64, 32, 4, 3, 1),
        (64, 32, 4, 4, 1),
    ],
    ("dkdv", 128): [
        (32, 64, 4, 3, 1),
        (32, 64, 4, 2, 1),
        (32, 64, 4, 3),
        (32, 128, 8, 3, 1),
        (32, 128, 4, 4, 1, 8, True),
        (32, 128, 4, 3, 1, 8, True),
    ],
    ("forward", 256): [(64, 32, 8, 2, 0, 1), (64, 32, 8, 2, 0, 4), (64, 16, 8, 2, 0, 1)],
    ("dqdr", 256): [(64, 32, 8, 2, 0, 1), (64, 32, 8, 2, 0, 4), (64, 16, 8, 2, 0, 1)],
    ("dkdv", 256): [(16, 64, 8, 2), (32, 64, 8, 2)],
}
"""Arguments of `Tile` for the candidates, by kernel and head width."""

VARIANTS: dict[KernelName, list[dict[str, Any]]] = {
    "forward": [{"is_centred": False}, {"save_vbar": False}],
    "dqdr": [{"is_corrected": False}],
    "dkdv": [],
}
"""Options to time with the fastest portable tile of the kernel, at `VARIED` head widths."""

VARIED = (64, 128)


def tile_candidates(head_dims: list[int], kernels: list[KernelName]) -> list[Candidate]:
    """Return the candidates for these head widths and kernels."""
    return [
        Candidate(kernel, head_dim, Tile(*shape))
        for (kernel, head_dim), shapes in TILES.items()
        for shape in shapes
        if head_dim in head_dims and kernel in kernels
    ]


def fastest(found: list[Candidate]) -> dict[tuple[KernelName, int], Candidate]:
    """Return the fastest correct candidate without options, by kernel and head width."""
    best: dict[tuple[KernelName, int], Candidate] = {}
    for c in found:
        key = c.kernel, c.head_dim
        if not c.options and c.is_right and (key not in best or c.time_ms < best[key].time_ms):
            best[key] = c
    return best


def variants_of(found: list[Candidate]) -> list[Candidate]:
    """Return the fastest portable tiles with other options, which warp-specialized kernels do not have."""
    plain = [c for c in found if not c.tile.is_specialized]
    return [
        Candidate(kernel, head_dim, best.tile, options)
        for (kernel, head_dim), best in fastest(plain).items()
        for options in VARIANTS[kernel]
        if head_dim in VARIED
    ]


class Problem:
    """Inputs of one head width, and the forward results that the backward kernels need.

    Args:
        head_dim: Head width K.
        num_tokens: Tokens per row T.
        batch_size: Number of rows B.
        num_kv_heads: Heads of the keys G.
        device: Device of the inputs.
    """

    def __init__(
        self, head_dim: int, num_tokens: int, batch_size: int, num_kv_heads: int = 8, device: str = "cuda"
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(num_heads: int) -> Tensor:
            shape = (batch_size, num_tokens, num_heads, head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        q, r, do = (normal(NUM_HEADS) for _ in range(3))
        k, v = (normal(num_kv_heads) for _ in range(2))
        self.operands = backward.Operands(q, r, k, v, do)
        self.first: dict[KernelName, tuple[Tensor, ...]] = {}
        self.scale = head_dim**-0.5
        self.mask = Mask(None, None, None)
        self.o, self.vbar, self.lse, self.tbar = forward.forward(
            q, r, k, v, None, self.scale, None, save_vbar=True
        )
        self.rows = backward.query_gradients(
            self.operands, self.o, self.vbar, self.lse, self.tbar, self.mask, self.scale
        )[2]

    def launch(self, candidate: Candidate) -> tuple[Tensor, ...]:
        """Run a candidate and return its results."""
        options: dict[str, Any] = {"tile": candidate.tile, **candidate.options}
        if candidate.kernel == "forward":
            options = {"save_vbar": True, **options}
            return forward.forward(*self.operands[:4], None, self.scale, None, **options)[:1]
        if candidate.kernel == "dqdr":
            saved = (self.o, self.vbar, self.lse, self.tbar)
            return backward.query_gradients(self.operands, *saved, self.mask, self.scale, **options)[:2]
        return backward.key_gradients(self.operands, self.rows, self.mask, self.scale, **options)

    def deviation(self, candidate: Candidate) -> float:
        """Return the largest relative difference from the results of the kernel's first candidate."""
        results = self.launch(candidate)
        truth = self.first.setdefault(candidate.kernel, results)
        return max(relative_error(*pair) for pair in zip(results, truth, strict=True))


def _compile(candidate: Candidate, num_kv_heads: int) -> None:
    try:
        Problem(candidate.head_dim, 128, 1, num_kv_heads).launch(candidate)
    except Exception as error:  # compilation errors are reported when the candidate is timed
        print(f"{candidate.label}: {type(error).__name__}", file=sys.stderr)


def compile_all(found: list[Candidate], pool: ProcessPoolExecutor, num_kv_heads: int) -> None:
    """Compile candidates into Triton's cache in parallel; kernels do not depend on the length."""
    list(pool.map(partial(_compile, num_kv_heads=num_kv_heads), found))


def _median_ms(run: Callable[[], object]) -> float:
    median = do_bench(run, warmup=15, rep=60, return_mode="median")
    assert isinstance(median, float)
    return median


def time_all(found: list[Candidate], problems: dict[int, Problem], num_rounds: int) -> None:
    """Measure times and deviations, round by round over all candidates of a head width."""
    for head_dim, problem in problems.items():
        group = [c for c in found if c.head_dim == head_dim]
        for candidate in group:
            try:
                candidate.deviation = problem.deviation(candidate)
            except Exception as error:  # a candidate may exceed the resources of the GPU
                candidate.error = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        for _ in range(num_rounds):
            for candidate in group:
                if candidate.error is None:
                    candidate.times_ms.append(_median_ms(partial(problem.launch, candidate)))


def accuracy(head_dim: int, is_centred: bool, is_corrected: bool, key_offset: float) -> dict[str, float]:
    """Return relative errors against fp64 at T = 1024."""
    inputs = make_inputs(
        1, 1024, NUM_HEADS, 8, head_dim, dtype=torch.bfloat16, device="cuda", key_offset=key_offset
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
    """Measure, print and return errors with and without the numerical corrections."""
    rows = []
    print("| head width | key offset | corrections | o | dQ | dR | dK | dV |\n|" + "---|" * 8)
    for head_dim, key_offset, is_on in itertools.product(head_dims, (0.0, 3.0, 8.0), (True, False)):
        errors = accuracy(head_dim, is_on, is_on, key_offset)
        rows.append({"head_dim": head_dim, "key_offset": key_offset, "corrections": is_on, **errors})
        numbers = " | ".join(f"{x:.5f}" for x in errors.values())
        print(f"| {head_dim} | {key_offset:g} | {'on' if is_on else 'off'} | {numbers} |", flush=True)
    return rows


def report(found: list[Candidate], num_tokens: int, batch_size: int) -> None:
    """Print all candidates, the fastest of each kernel first, then the entries for tiles.py."""
    keys = list(dict.fromkeys((c.head_dim, c.kernel) for c in found))
    for head_dim, kernel in keys:
        flops = PRODUCTS[kernel] * batch_size * NUM_HEADS * num_tokens**2 * head_dim
        print(f"\n{kernel}, head width {head_dim}: (block_t, block_s, warps, stages, in_registers)")
        group = [c for c in found if (c.head_dim, c.kernel) == (head_dim, kernel)]
        for c in sorted(group, key=lambda c: c.time_ms):
            times = " ".join(f"{t:.3f}" for t in c.times_ms)
            rate = f"{flops / c.time_ms / 1e9:4.0f} TFLOP/s" if c.times_ms else c.error
            wrong = "" if c.is_right or not c.times_ms else f" WRONG by {c.deviation:.1e}"
            print(f"  {c.label:66s} {times} ms {rate}{wrong}")
    best = fastest(found)
    print()
    for (kernel, head_dim), c in best.items():
        print(f'    ("{kernel}", {head_dim}): Tile{tuple(c.tile)},  # {c.time_ms:.3f} ms')
    for head_dim in sorted({head_dim for _, head_dim in best}):
        times = [c.time_ms for (_, width), c in best.items() if width == head_dim]
        parts = " + ".join(f"{t:.3f}" for t in times)
        print(f"head width {head_dim}: {parts} = {sum(times):.3f} ms")


def main() -> None:
    """Run `python -m benchmarks.tune_attention`."""
    parser = make_parser("tune_attention", __doc__, name="tune_attention")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64, 96, 256], help="head widths")
    parser.add_argument("--kernels", nargs="+", default=list(PRODUCTS), choices=list(PRODUCTS), help="(all)")
    parser.add_argument("--num-tokens", type=int, default=4096, help="tokens per row (4096)")
    parser.add_argument("--batch-size", type=int, default=8, help="number of rows (8)")
    parser.add_argument("--num-kv-heads", type=int, default=8, help="heads of the keys (8)")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds (2)")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile (12)")
    args = parse(parser)

    found = tile_candidates(args.head_dims, args.kernels)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        compile_all(found, pool, args.num_kv_heads)
        errors = check_accuracy([k for k in args.head_dims if k in VARIED])
        problems = {
            k: Problem(k, args.num_tokens, args.batch_size, args.num_kv_heads) for k in args.head_dims
        }
        time_all(found, problems, args.rounds)
        varied = variants_of(found)
        compile_all(varied, pool, args.num_kv_heads)
    time_all(varied, problems, args.rounds)
    report([*found, *varied], args.num_tokens, args.batch_size)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / _median_ms(lambda: x @ x) / 1e9
    print(
        f"\n8192^3 bf16 product: {rate:.0f} TFLOP/s; triton {triton.__version__}, torch {torch.__version__}"
    )
    path = write_result(
        args.name,
        {
            "command": shlex.join(["python", "-m", "benchmarks.tune_attention", *sys.argv[1:]]),
            "num_tokens": args.num_tokens,
            "batch_size": args.batch_size,
            "num_kv_heads": args.num_kv_heads,
            "matmul_tflops": rate,
            "accuracy": errors,
            "candidates": [asdict(c) for c in [*found, *varied]],
        },
        args.out,
    )
    print(path)


if __name__ == "__main__":
    sys.exit(run_command(main))
