"""Times attention implementations in turns and alone; used by `benchmarks.attention`.

It imports torch alone, for the process of the authors' package, whose name is that of ours
(`benchmarks/attention_authors.py`).
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Pair = tuple[float, float]
"""Milliseconds of forward and backward."""

_MIN_RUNS_ALONE = 30
_FLUSHED_BYTES = 2**28  # more than the L2 cache of any GPU
_SLEEP_CYCLES = 4_000_000  # about 2 ms, in which the host runs ahead of the GPU


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


class Provider(NamedTuple):
    """An attention implementation to time.

    Attributes:
        label: Name in the table.
        attend: Called as attend(q, r, k, v), without r for softmax attention, in the provider's layout.
        is_parallax: Whether it takes the probe r.
        heads_first: Whether inputs and output have the layout `[B, H, T, K]`.
        module: Module that must be installed; None for torch and this project.
    """

    label: str
    attend: Callable[..., Tensor]
    is_parallax: bool
    heads_first: bool = False
    module: str | None = None

    @property
    def products(self) -> tuple[int, int]:
        """Number of products counted as FLOPs, forward and backward."""
        return (4, 8) if self.is_parallax else (2, 5)


@dataclass
class Cell:
    """Time and memory of one provider at one shape.

    Attributes:
        provider: Name of the provider.
        shape: Shape of the problem.
        forward_ms: Median time of the forward in turns with the other providers, milliseconds.
        backward_ms: The same of the backward.
        peak_mib: Peak memory of forward and backward above the inputs, MiB.
        rounds_ms: Times of forward and backward in each round.
        alone_ms: Medians of forward and backward of back-to-back runs, or None where that was skipped.
        error: Error that the provider raised, or None.
    """

    provider: str
    shape: Shape
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    peak_mib: float = 0.0
    rounds_ms: list[Pair] = field(default_factory=list)
    alone_ms: Pair | None = None
    error: str | None = None

    @property
    def sum_ms(self) -> float:
        """Time of forward and backward in turns, milliseconds."""
        return self.forward_ms + self.backward_ms


class Runner(Protocol):
    """One provider with its inputs at one shape, in this process or in another."""

    def warm_up(self) -> float:
        """Compile, and return the peak memory of forward and backward above the inputs in MiB."""
        ...

    def take_turn(self) -> Pair:
        """Run once with a cold L2 cache."""
        ...

    def run_alone(self, num_runs: int) -> Pair:
        """Run back to back; return medians of all but the first third, in which the GPU warms up."""
        ...


def draw(shape: Shape) -> tuple[Tensor, ...]:
    """Draw standard normal bf16 q, r, k, v and the gradient of the output on the GPU, `[B, T, H or G, K]`."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(num_heads: int) -> Tensor:
        size = (shape.batch_size, shape.num_tokens, num_heads, shape.head_dim)
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, r, do = (normal(shape.num_heads) for _ in range(3))
    k, v = (normal(shape.num_kv_heads) for _ in range(2))
    return q, r, k, v, do


class LocalRunner:
    """A provider that runs in this process.

    Args:
        provider: The provider.
        inputs: q, r, k, v and the gradient of the output, `[B, T, H or G, K]`; copied to the provider's
            layout.
    """

    def __init__(self, provider: Provider, inputs: Sequence[Tensor]) -> None:
        q, r, k, v, do = inputs
        self.names = ("q", "r", "k", "v") if provider.is_parallax else ("q", "k", "v")
        tensors = (q, r, k, v, do) if provider.is_parallax else (q, k, v, do)
        if provider.heads_first:
            tensors = tuple(x.transpose(1, 2).contiguous() for x in tensors)
        *leaves, self.do = (x.detach() for x in tensors)
        self.leaves = [x.requires_grad_() for x in leaves]
        self.provider = provider

    def results(self) -> dict[str, Tensor]:
        """Return the output as "o" and the gradients as "dq", "dr", "dk" and "dv", `[B, T, H or G, K]`."""
        o = self.provider.attend(*self.leaves)
        gradients = torch.autograd.grad(o, self.leaves, self.do)
        found = {"o": o.detach()} | {f"d{name}": x for name, x in zip(self.names, gradients, strict=True)}
        return {name: x.transpose(1, 2) if self.provider.heads_first else x for name, x in found.items()}

    def _run(self) -> list[torch.cuda.Event]:
        """Run forward and backward; return CUDA events before, between and after them."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        o = self.provider.attend(*self.leaves)
        events[1].record()
        torch.autograd.grad(o, self.leaves, self.do)
        events[2].record()
        return events

    def warm_up(self) -> float:
        """Compile, and return the peak memory of forward and backward above the inputs in MiB."""
        self._run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def take_turn(self) -> Pair:
        """Run once with a cold L2 cache."""
        torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda").zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)
        return self._read(self._run())

    def run_alone(self, num_runs: int) -> Pair:
        """Run back to back; return medians of all but the first third, in which the GPU warms up."""
        events = [self._run() for _ in range(num_runs)]
        times = [self._read(each) for each in events[num_runs // 3 :]]
        return _median(times)

    @staticmethod
    def _read(events: list[torch.cuda.Event]) -> Pair:
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])


def _median(times: Sequence[Pair]) -> Pair:
    forwards, backwards = zip(*times, strict=True)
    return statistics.median(forwards), statistics.median(backwards)


def measure(
    shape: Shape, runners: Mapping[str, Runner], seconds: float, seconds_alone: float = 0.0
) -> list[Cell]:
    """Time providers in turns at one shape, then each alone.

    Args:
        shape: Shape of the problem.
        runners: The providers by name.
        seconds: Duration of all rounds, of which there are 5 to 30; each starts with the next provider.
        seconds_alone: Duration for which each then runs alone, at least 30 times; 0 to skip this.

    Returns:
        A cell for each provider; one that fails has an error instead of times.
    """
    cells = {name: Cell(name, shape) for name in runners}
    for name, runner in runners.items():
        try:
            cells[name].peak_mib = runner.warm_up()
        except Exception as error:  # a provider may not support a shape, or not be installed
            cells[name].error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            print(f"{name} {shape}: {cells[name].error}", file=sys.stderr)
    names = [name for name in runners if cells[name].error is None]
    round_ms = sum(sum(runners[name].take_turn()) for name in names)
    num_rounds = max(5, min(30, int(seconds * 1e3 / round_ms))) if names else 0
    for i_round in range(num_rounds):
        first = i_round % len(names)
        for name in names[first:] + names[:first]:
            cells[name].rounds_ms.append(runners[name].take_turn())
    for name in names:
        cell = cells[name]
        cell.forward_ms, cell.backward_ms = _median(cell.rounds_ms)
        if seconds_alone > 0:
            num_runs = max(_MIN_RUNS_ALONE, int(seconds_alone * 1e3 / cell.sum_ms))
            cell.alone_ms = runners[name].run_alone(num_runs)
    return list(cells.values())
