"""Kernels that save passes over memory, beside what Inductor compiles: norm and RoPE of heads, and the loss.

`python -m benchmarks.memory_passes` runs on a GPU. It checks the errors of both against fp64, then times them
in turns, with a cold L2 cache: for q, k and r together forward and backward, for the loss both in one. GB/s
counts what must be read and written once: x and y forward, x, dy and dx backward; for the loss the logits and
their gradient. `--tune` also times other tiles of the kernels.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention_providers import parse_heads
from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import run_command
from models import loss
from models.attention.base import Rope
from models.kernels import cross_entropy, norm_rope
from parallax.testing import relative_error

EPS = 1e-6
MARGIN = 1.05
"""Largest permitted ratio of our error to that of the compiled path."""

Times = dict[str, float]


def _cold_times(functions: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Return median times in ms of functions called in turns, each with a cold L2 cache, as in a step."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 3):
        for name, function in functions.items():
            torch.empty(2**26, dtype=torch.int32, device="cuda").zero_()
            # the host runs ahead, so that launches take no time
            torch.cuda._sleep(8_000_000)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(each[3:]) for name, each in times.items()}


@contextmanager
def _set(module: Any, **values: object) -> Iterator[None]:
    """Set attributes of a module for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _plain(x: list[Tensor], gains: list[Tensor], rope: Rope) -> list[Tensor]:
    """Normalize and rotate heads by PyTorch."""
    pairs = zip(x, gains, strict=True)
    return [rope(F.rms_norm(each, (each.shape[-1],), gain, EPS)) for each, gain in pairs]


class Heads:
    """Projected q, k and r of B rows, the gradients of what attention reads, and the gains of the norms.

    Args:
        num_rows: Rows B.
        num_tokens: Tokens T of a row.
        heads: Number of heads of each.
        head_dim: Head width K.
        dtype: Dtype of all; the values are those of bf16.
    """

    def __init__(
        self, num_rows: int, num_tokens: int, heads: list[int], head_dim: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

        shapes = [(num_rows, num_tokens, count, head_dim) for count in heads]
        self.x = [draw(*shape).to(dtype).requires_grad_() for shape in shapes]
        self.dy = [draw(*shape).to(dtype) for shape in shapes]
        self.gains = [(1 + 0.1 * draw(head_dim)).to(dtype).requires_grad_() for _ in heads]
        self.rope = Rope(torch.arange(num_tokens, device="cuda")[None], head_dim, 1e6)

    def plain(self) -> list[Tensor]:
        """Normalize and rotate by PyTorch."""
        return _plain(self.x, self.gains, self.rope)

    def compiled(self) -> list[Tensor]:
        """Normalize and rotate by what Inductor compiles."""
        return _compiled(self.x, self.gains, self.rope)

    def ours(self) -> list[Tensor]:
        """Normalize and rotate by the kernel."""
        angles = self.rope.cos, self.rope.sin
        pairs = zip(self.x, self.gains, strict=True)
        return [norm_rope.norm_rope_forward(x, gain, *angles, EPS) for x, gain in pairs]

    def results(self, forward: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return outputs and all gradients."""
        y = forward()
        return [*(each.detach() for each in y), *torch.autograd.grad(y, [*self.x, *self.gains], self.dy)]

    def backward(self, y: list[Tensor]) -> Callable[[], Any]:
        """Return the backward of outputs as a function, to be called many times."""
        return lambda: torch.autograd.grad(y, [*self.x, *self.gains], self.dy, retain_graph=True)

    def num_bytes(self) -> int:
        """Return the bytes of all heads."""
        return sum(x.numel() * x.element_size() for x in self.x)


_compiled = torch.compile(_plain)


def _ratios(errors: dict[str, list[float]]) -> list[float]:
    """Return our errors over the compiled path's; exits if one is too large, so that no time is reported."""
    ratios = [ours / other for ours, other in zip(errors["ours"], errors["compiled"], strict=True)]
    if not max(ratios) <= MARGIN:
        sys.exit(f"no times are reported: errors {errors}")
    return ratios


def measure_heads(args: argparse.Namespace) -> dict[str, Any]:
    """Check and time norm and RoPE of q and k, and of q, k and r."""
    num_heads, num_kv_heads = parse_heads(args.heads)
    kinds = {"softmax": [num_heads, num_kv_heads], "parallax": [num_heads, num_kv_heads, num_heads]}
    return {name: _measure_heads(heads, args) for name, heads in kinds.items()}


def _measure_heads(heads: list[int], args: argparse.Namespace) -> dict[str, Any]:
    torch.compiler.reset()
    small = Heads(2, 1000, heads, args.head_dim, torch.bfloat16)
    wide = Heads(2, 1000, heads, args.head_dim, torch.float64)
    truth = wide.results(wide.plain)
    errors = {
        name: [relative_error(x, t) for x, t in zip(small.results(forward), truth, strict=True)]
        for name, forward in (("compiled", small.compiled), ("ours", small.ours))
    }
    row: dict[str, Any] = {"errors": errors, "error_ratios": _ratios(errors)}
    torch.compiler.reset()
    inputs = Heads(args.tokens // args.seq_len, args.seq_len, heads, args.head_dim, torch.bfloat16)
    forwards = {"compiled": inputs.compiled, "ours": inputs.ours}
    row["forward_ms"] = _cold_times(forwards, args.rounds)
    backwards = {name: inputs.backward(forward()) for name, forward in forwards.items()}
    row["backward_ms"] = _cold_times(backwards, args.rounds)
    for key, passes in (("forward", 2), ("backward", 3)):
        times = row[f"{key}_ms"]
        num_bytes = passes * inputs.num_bytes()
        row[f"{key}_gb_per_s"] = {name: num_bytes / ms / 1e6 for name, ms in times.items()}
        row[f"{key}_speedup"] = times["compiled"] / times["ours"]
    if args.tune:
        row["tiles"] = _tune_heads(inputs, args.rounds)
    return row


def _tune_heads(inputs: Heads, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for pairs in (256, 512, 1024, 2048):
        for num_warps in (1, 2, 4, 8):
            if not 4 <= pairs // (32 * num_warps) <= 32:
                continue
            with _set(norm_rope, _TILE_PAIRS=pairs, _NUM_WARPS=num_warps):
                times = _cold_times(
                    {"forward": inputs.ours, "backward": inputs.backward(inputs.ours())}, rounds
                )
            rows.append({"tile_pairs": pairs, "num_warps": num_warps, **times})
    return rows


@contextmanager
def _compiled_path() -> Iterator[None]:
    """Compute the loss without the kernel, and round each chunk's part of dW to bf16, for a while."""

    def add(dweight: Tensor | None, dlogits: Tensor, x: Tensor, accumulator: torch.dtype) -> Tensor:
        if dweight is None:
            dweight = torch.zeros(dlogits.shape[1], x.shape[1], dtype=accumulator, device="cuda")
        return dweight.add_(dlogits.T @ x)

    with _set(cross_entropy, serves=lambda logits: False), _set(loss, _add_weight_gradient=add):
        yield


class Head:
    """Hidden states, weight and labels of the loss, in bf16, and the loss of a chunk size.

    Args:
        num_tokens: Tokens T.
        width: Width D.
        vocab_size: Ids V.
    """

    def __init__(self, num_tokens: int, width: int, vocab_size: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(1, num_tokens, width, generator=generator, device="cuda")
        weight = torch.randn(vocab_size, width, generator=generator, device="cuda") * (2 / width**0.5)
        self.x, self.weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
        self.labels = torch.randint(0, vocab_size, (1, num_tokens), generator=generator, device="cuda")

    def results(self, chunk_tokens: int) -> list[Tensor]:
        """Return the mean loss, dx and dW."""
        total = loss.linear_cross_entropy(self.x, self.weight, self.labels, chunk_tokens)
        total = total / self.labels.numel()
        return [total.detach(), *torch.autograd.grad(total, (self.x, self.weight))]

    def compiled_results(self, chunk_tokens: int) -> list[Tensor]:
        """Return the same without the kernel, with parts of dW in bf16."""
        with _compiled_path():
            return self.results(chunk_tokens)

    def truth(self) -> list[Tensor]:
        """Return the same in fp64."""
        wide = [x.detach().double().requires_grad_() for x in (self.x, self.weight)]
        total = loss.cross_entropy(wide[0] @ wide[1].T, self.labels) / self.labels.numel()
        return [total.detach(), *torch.autograd.grad(total, wide)]


def measure_loss(args: argparse.Namespace) -> dict[str, Any]:
    """Check and time the loss and its gradients, and the kernel alone."""
    torch.compiler.reset()
    small = Head(2048, args.width, 16384)
    truth = small.truth()
    errors = {
        name: [relative_error(x, t) for x, t in zip(results(256), truth, strict=True)][1:]
        for name, results in (("compiled", small.compiled_results), ("ours", small.results))
    }
    result: dict[str, Any] = {"errors": errors, "error_ratios": _ratios(errors)}
    torch.compiler.reset()  # a second shape would be compiled for all shapes
    head = Head(args.tokens, args.width, args.vocab_size)
    functions: dict[str, Callable[[], Any]] = {"compiled 4096": lambda: head.compiled_results(4096)}
    for chunk in (4096, 8192, 16384):
        functions[f"ours {chunk}"] = lambda chunk=chunk: head.results(chunk)
    result["loss_ms"], result["peak_gib"] = {}, {}
    for name, function in functions.items():
        function()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        result["peak_gib"][name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    result["loss_ms"] = _cold_times(functions, args.rounds)
    result["speedup"] = result["loss_ms"]["compiled 4096"] / result["loss_ms"][f"ours {loss.CHUNK_TOKENS}"]
    torch.cuda.empty_cache()
    torch.compiler.reset()
    rows, labels = head.x.detach()[0, : loss.CHUNK_TOKENS], head.labels[0, : loss.CHUNK_TOKENS]
    logits, gradient = (
        torch.randn(len(rows), args.vocab_size, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    out, weight = torch.empty_like(logits), head.weight.detach()
    dweight = torch.zeros(weight.shape, device="cuda")
    kernels: dict[str, Callable[[], Any]] = {
        "compiled": lambda: loss._compile(loss._chunk_loss)(logits, labels, 0.0),
        "ours": lambda: cross_entropy.cross_entropy_(logits, labels, 0.0, needs_grad=True),
        "copy": lambda: out.copy_(gradient),
        "logits": lambda: torch.mm(rows, weight.T, out=out),
        "dx": lambda: torch.mm(gradient, weight),
        "dW in bf16": lambda: torch.mm(gradient.T, rows),
        "dW in fp32": lambda: torch.mm(gradient.T, rows, out_dtype=torch.float32),
        "dW added in fp32": lambda: loss._add_weight_gradient(dweight, gradient, rows, torch.float32),
        "dW added after bf16": lambda: dweight.add_(gradient.T @ rows),
    }
    result["parts_ms"] = _cold_times(kernels, args.rounds)
    num_bytes = 2 * logits.numel() * logits.element_size()
    result["kernel_gb_per_s"] = {
        name: num_bytes / result["parts_ms"][name] / 1e6 for name in ("compiled", "ours", "copy")
    }
    if args.tune:
        result["tiles"] = []
        for block in (8192, 16384, 32768):
            for num_warps in (8, 16, 32):
                with _set(cross_entropy, _BLOCK=block, _NUM_WARPS=num_warps):
                    times = _cold_times({"ours": kernels["ours"]}, args.rounds)
                result["tiles"].append({"block": block, "num_warps": num_warps, "ms": times["ours"]})
    return result


def main() -> None:
    """Run `python -m benchmarks.memory_passes`."""
    parser = make_parser("memory_passes", __doc__, name="memory_passes")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a micro-batch (32768)")
    parser.add_argument("--seq-len", type=int, default=4096, help="length of a row (4096)")
    parser.add_argument("--heads", default="16/8", help="query/kv heads (16/8)")
    parser.add_argument("--head-dim", type=int, default=128, help="head width (128)")
    parser.add_argument("--width", type=int, default=1024, help="model width (1024)")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="ids (151936)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (20)")
    parser.add_argument("--tune", action="store_true", help="also time other tiles")
    parser.add_argument("--only", choices=("heads", "loss"), help="one of the two")
    args = parse(parser)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.memory_passes", *sys.argv[1:]])
    }
    for name, measure in (("heads", measure_heads), ("loss", measure_loss)):
        if args.only in (None, name):
            result[name] = measure(args)
            print(f"{name}: {result[name]}", flush=True)
    print(write_result(args.name, result, args.out))


if __name__ == "__main__":
    sys.exit(run_command(main))
