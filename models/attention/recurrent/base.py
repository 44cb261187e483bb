"""The base class of the recurrent baselines, and how they run over tokens on CPU and CUDA.

A baseline defines its computation once, in `mix`, on a ScanContext: over whole rows from empty states, over
packed prompts whose final states are stored, or over new tokens from stored states. Whole rows run through
the functions for CPU in this package or, on CUDA, through flash-linear-attention's kernels (fla.py); new
tokens through the plain recurrence in fp32 on both.

Letters: B batch, T tokens, D width, H heads, K key width, V value width, C channels, N documents.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.attention.base import Attention, Rope, State, mean_visible_keys
from models.attention.recurrent.delta_rule import gated_delta_rule, gated_delta_rule_steps
from models.attention.recurrent.fla import (
    FLA_CHUNK_TOKENS,
    fused_convolution,
    fused_delta_rule,
    fused_mesa,
    fused_state_space,
)
from models.attention.recurrent.mesa import mesa, mesa_steps
from models.attention.recurrent.short_convolution import last_inputs, short_convolution
from models.attention.recurrent.state_space import state_space, state_space_steps

CONV_WIDTH = 4


class Recurrence(NamedTuple):
    """Three implementations of a recurrence, with the same tensors in, and the output and final states out.

    Attributes:
        state_names: Names of the states.
        chunked: Over rows, chunk by chunk, for CPU.
        fused: Over rows, for CUDA; with output_final_state it returns the states of every document.
        steps: Token by token from given `states`.
    """

    state_names: tuple[str, ...]
    chunked: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    fused: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]
    steps: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


GATED_DELTA_RULE = Recurrence(("state",), gated_delta_rule, fused_delta_rule, gated_delta_rule_steps)
STATE_SPACE = Recurrence(("state",), state_space, fused_state_space, state_space_steps)
MESA = Recurrence(("key_state", "value_state"), mesa, fused_mesa, mesa_steps)


class ShortConvolution(nn.Module):
    """The parameters of a short causal convolution.

    Args:
        num_channels: Channels C.
        bias: Whether every channel has a bias.
    """

    def __init__(self, num_channels: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, CONV_WIDTH))
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None


class ScanContext(Protocol):
    """Runs convolutions and recurrences over tokens, with the past that these tokens have."""

    def convolve(self, name: str, conv: ShortConvolution, x_BTC: Tensor) -> Tensor:
        """Apply a convolution and silu to `[B, T, C]`; `name` is that of its state."""
        ...

    def scan(self, recurrence: Recurrence, streams: tuple[Tensor, ...], *constants: Any) -> Tensor:
        """Run a recurrence: streams are `[B, T, H, ...]`, constants have no token axis; `[B, T, H, V]`."""
        ...


class RowScan:
    """Scans whole rows: every document starts from empty states.

    Args:
        cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1; None for B rows of one document each.
        state: Where row n stores the final states of document n (needs cu_seqlens); None to drop them.
    """

    def __init__(self, cu_seqlens: Tensor | None, state: State | None = None) -> None:
        assert state is None or cu_seqlens is not None
        self.cu_seqlens = cu_seqlens
        self.state = state

    def convolve(self, name: str, conv: ShortConvolution, x_BTC: Tensor) -> Tensor:
        """See ScanContext.convolve."""
        if self.state is not None:
            assert self.cu_seqlens is not None
            self.state[name].copy_(last_inputs(x_BTC, self.cu_seqlens, CONV_WIDTH - 1))
        if x_BTC.is_cuda:
            return fused_convolution(x_BTC, conv.weight, conv.bias, self.cu_seqlens)
        return short_convolution(x_BTC, conv.weight, conv.bias, cu_seqlens=self.cu_seqlens)

    # fla's kernels cannot be traced, and tracing the loops over chunks is not worth its compile time
    @torch.compiler.disable
    def scan(self, recurrence: Recurrence, streams: tuple[Tensor, ...], *constants: Any) -> Tensor:
        """See ScanContext.scan."""
        if streams[0].is_cuda:
            o, states = recurrence.fused(
                *streams,
                *constants,
                cu_seqlens=self.cu_seqlens,
                output_final_state=self.state is not None,
            )
            self._store(recurrence, slice(None), states)
            return o.to(streams[2].dtype)
        if self.state is None:
            return recurrence.chunked(*streams, *constants, cu_seqlens=self.cu_seqlens)[0]
        assert self.cu_seqlens is not None
        bounds, outputs = self.cu_seqlens.tolist(), []
        for n in range(len(bounds) - 1):
            document = (x[:, bounds[n] : bounds[n + 1]] for x in streams)
            o, states = recurrence.chunked(*document, *constants, cu_seqlens=None)
            self._store(recurrence, slice(n, n + 1), states)
            outputs.append(o)
        return torch.cat(outputs, dim=1)

    def _store(self, recurrence: Recurrence, rows: slice, states: tuple[Tensor | None, ...]) -> None:
        if self.state is not None:
            for name, state in zip(recurrence.state_names, states, strict=True):
                assert state is not None
                self.state[name][rows].copy_(state)


class StepScan:
    """Scans new tokens from stored states, which are updated in place.

    Args:
        state: The states of B sequences.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    def convolve(self, name: str, conv: ShortConvolution, x_BTC: Tensor) -> Tensor:
        """See ScanContext.convolve."""
        past_BPC = self.state[name]
        y_BTC = short_convolution(x_BTC, conv.weight, conv.bias, past_BPC=past_BPC)
        past_BPC.copy_(torch.cat((past_BPC, x_BTC.to(past_BPC.dtype)), dim=1)[:, -past_BPC.shape[1] :])
        return y_BTC

    def scan(self, recurrence: Recurrence, streams: tuple[Tensor, ...], *constants: Any) -> Tensor:
        """See ScanContext.scan."""
        states = tuple(self.state[name] for name in recurrence.state_names)
        o, new_states = recurrence.steps(*streams, *constants, states=states)
        for state, new_state in zip(states, new_states, strict=True):
            state.copy_(new_state)
        return o


class RecurrentAttention(Attention):
    """An attention module with a state of fixed size instead of a KV cache, and without RoPE.

    All parameters of a block are cast alike: in a bf16 run the parameters of the gates (a_log, dt_bias,
    ridge) are rounded to bf16 before the gates' fp32 arithmetic. The optimizer's copies stay fp32.
    """

    has_graph_breaks = True

    @abstractmethod
    def mix(self, x_BTD: Tensor, context: ScanContext) -> Tensor:
        """Mix every token with its past, `[B, T, D]` to `[B, T, D]`."""

    @abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every state of one sequence by name; a convolution's is conv_state_shape."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See Attention.initial_value.

        Convolutions are uniform within 1 / sqrt(CONV_WIDTH), as torch's; biases of projections are 0.
        """
        if "_conv." in name:
            return torch.empty(shape).uniform_(-(CONV_WIDTH**-0.5), CONV_WIDTH**-0.5, generator=generator)
        return torch.zeros(shape) if name.endswith(".bias") else None

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """See Attention.forward."""
        return self.mix(x_BTD, RowScan(cu_seqlens))

    def new_state(self, batch: int, max_seqlen: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """See Attention.new_state: at least fp32, of a size independent of max_seqlen."""
        dtype = torch.promote_types(dtype, torch.float32)
        return {
            name: torch.zeros(batch, *shape, device=device, dtype=dtype)
            for name, shape in self.state_shapes().items()
        }

    def prefill(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """See Attention.prefill."""
        return self.mix(x_BTD, RowScan(cu_seqlens, state))

    def extend(self, x_BTD: torch.Tensor, rope: Rope, state: State, lengths_B: torch.Tensor) -> torch.Tensor:
        """See Attention.extend."""
        return self.mix(x_BTD, StepScan(state))

    def projection_flops_per_token(self) -> float:
        """See Attention.projection_flops_per_token."""
        return 6.0 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def num_cache_elements(self, seq_len: int) -> int:
        """See Attention.num_cache_elements: states and inputs of the convolutions, independent of seq_len."""
        return sum(math.prod(shape) for shape in self.state_shapes().values())


def conv_state_shape(conv: ShortConvolution) -> tuple[int, int]:
    """Return the shape of a convolution's state of one sequence: its last CONV_WIDTH - 1 inputs."""
    return (CONV_WIDTH - 1, conv.weight.shape[0])


def mean_visible_keys_in_chunk(seq_len: int) -> float:
    """Return the mean number of tokens of its own chunk that a token sees in fla's kernels."""
    return mean_visible_keys(min(seq_len, FLA_CHUNK_TOKENS), None)
