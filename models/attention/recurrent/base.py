"""What the recurrent baselines share: how a mechanism runs over rows and through a state, on either device.

A baseline says once how it mixes (`mix`), through a `Past`: over whole rows, over rows that leave their
states behind, or on from states. On a CPU rows go through the plain functions of models/recurrent, on CUDA
through flash-linear-attention's kernels, which only this file imports. Going on from a state is the plain
recurrence on both, in fp32.

Letters: B batch, T tokens, D width, H heads, K key width, V value width, C channels, N documents.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.attention.base import Attention, Rope, State, mean_visible_keys
from models.attention.recurrent.delta_rule import gated_delta_rule, gated_delta_rule_steps
from models.attention.recurrent.gradient_scale import with_gradients_of_usual_size
from models.attention.recurrent.mesa import mesa, mesa_steps
from models.attention.recurrent.short_convolution import last_inputs, short_convolution
from models.attention.recurrent.state_space import state_space, state_space_steps

CONV_WIDTH = 4
_FLA_CHUNK_TOKENS = 64


class _Fla(NamedTuple):
    """The parts of flash-linear-attention 0.6 that stand in for the plain functions."""

    causal_conv1d: Any
    chunk_gated_delta_rule: Any
    chunk_kda: Any
    chunk_mesa_net: Any
    chunk_simple_gla: Any
    has_faulty_gated_backward: bool


def _fla(like: Tensor) -> _Fla:
    if like.dtype == torch.float64:
        raise NotImplementedError("the kernels of the recurrent baselines know no fp64; run it on the CPU")
    try:
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda
        from fla.ops.mesa_net import chunk_mesa_net
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla
        from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1
    except ImportError as error:
        raise ImportError(
            "the recurrent baselines run on CUDA through flash-linear-attention, and importing it failed: "
            f"{error}; pip install 'parallax-pretraining[baselines]'"
        ) from error
    is_faulty = IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1
    simple_gla = fused_chunk_simple_gla if is_faulty else chunk_simple_gla
    return _Fla(causal_conv1d, chunk_gated_delta_rule, chunk_kda, chunk_mesa_net, simple_gla, is_faulty)


def _fused_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    fla = _fla(q)
    options = {"output_final_state": keep, "use_qk_l2norm_in_kernel": True, "cu_seqlens": cu_seqlens}
    if g.shape[-1] == 1 and not fla.has_faulty_gated_backward:
        o, state = fla.chunk_gated_delta_rule(q, k, v, g.squeeze(-1), beta, **options)
        return o, (state,)
    if g.shape[-1] == 1:
        # fla's issue 640: its kernel refuses to run, the same rule with a decay for every channel does
        warnings.warn(
            "Gated DeltaNet runs slower here, through Kimi Delta Attention's kernels: Triton 3.4 to 3.7.0 "
            "compiles its own wrongly on Hopper; install Triton 3.7.1",
            stacklevel=1,
        )
        g = g.expand(*g.shape[:-1], q.shape[-1])
    o, state = fla.chunk_kda(q, k, v, g, beta, **options)
    return o, (state,)


def _fused_state_space(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    options = {"scale": 1.0, "output_final_state": keep, "cu_seqlens": cu_seqlens}
    o, state = _fla(q).chunk_simple_gla(q, k, v, g, **options)
    return o, (state,)


def _fused_mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    ridge: Tensor,
    num_iterations: int,
    *,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        return _fla(q).chunk_mesa_net(
            *tensors,
            output_final_state=keep,
            max_CG_iteration=num_iterations,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=cu_seqlens,
        )

    # its backward has 1e-5 in denominators and gradients in fp16: those of a mean over a batch vanish in them
    o, *states = with_gradients_of_usual_size(attend, q, k, v, g, beta, ridge)
    return o, tuple(states)


class Mechanism(NamedTuple):
    """A recurrence: all three take the same tensors and return an output and the states behind it.

    Attributes:
        states: What the states are called.
        plain: Over rows, for a CPU.
        fused: Over rows, for CUDA; `keep` asks for the states, of every document.
        steps: On from `states`.
    """

    states: tuple[str, ...]
    plain: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    fused: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]
    steps: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


GATED_DELTA_RULE = Mechanism(("state",), gated_delta_rule, _fused_delta_rule, gated_delta_rule_steps)
STATE_SPACE = Mechanism(("state",), state_space, _fused_state_space, state_space_steps)
MESA = Mechanism(("key_state", "value_state"), mesa, _fused_mesa, mesa_steps)


class ShortConvolution(nn.Module):
    """The parameters of a short causal convolution."""

    def __init__(self, num_channels: int, *, bias: bool = False) -> None:
        """Build the parameters.

        Args:
            num_channels: Channels C.
            bias: With a bias for each.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, CONV_WIDTH))
        self.bias = nn.Parameter(torch.empty(num_channels)) if bias else None


class Past(Protocol):
    """What comes before the tokens that an attention mixes."""

    def convolve(self, name: str, conv: ShortConvolution, x_BTC: Tensor) -> Tensor:
        """Convolve `[B, T, C]`, with silu; `name` is the convolution's state."""
        ...

    def scan(self, mechanism: Mechanism, streams: tuple[Tensor, ...], *constants: Any) -> Tensor:
        """Run a mechanism: streams are `[B, T, H, ...]`, constants have no tokens; returns `[B, T, H, V]`."""
        ...


class _Rows:
    """Nothing comes before: documents start in what is given, and leave their states where there is one."""

    def __init__(self, cu_seqlens: Tensor | None, state: State | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.state = state

    def convolve(self, name: str, conv: ShortConvolution, x_BTC: Tensor) -> Tensor:
        if self.state is not None:
            assert self.cu_seqlens is not None
            self.state[name].copy_(last_inputs(x_BTC, self.cu_seqlens, CONV_WIDTH - 1))
        if x_BTC.is_cuda:
            return _fused_convolution(x_BTC, conv.weight, conv.bias, self.cu_seqlens)
        return short_convolution(x_BTC, conv.weight, conv.bias, cu_seqlens=self.cu_seqlens)

    # fla's kernels cannot be traced, and the loops over chunks are not worth it
    @torch.compiler.disable
    def scan(self, mechanism: Mechanism, streams: tuple[Tensor, ...], *constants: Any) -> Tensor:
        if streams[0].is_cuda:
            keep = self.state is not None
            o, states = mechanism.fused(*streams, *constants, cu_seqlens=self.cu_seqlens, keep=keep)
            self._keep(mechanism, slice(None), states)
            return o.to(streams[2].dtype)
        if self.state is None:
            return mechanism.plain(*streams, *constants, cu_seqlens=self.cu_seqlens)[0]
        assert self.cu_seqlens is not None
        bounds, outputs = self.cu_seqlens.tolist(), []
        for n in range(len(bounds) - 1):
            document = (x[:, bounds[n] : bounds[n + 1]] for x in streams)
            o, states = mechanism.plain(*document, *constants, cu_seqlens=None)
            self._keep(mechanism, slice(n, n + 1), states)
            outputs.append(o)
        return torch.cat(outputs, dim=1)

    def _keep(self, mechanism: Mechanism, rows: slice, states: tuple[Tensor | None, ...]) -> None:
        if self.state is not None:
            for name, state in zip(mechanism.states, states, strict=True):
                assert state is not None
                self.state[name][rows].copy_(state)


@torch.compiler.disable
def _fused_convolution(
    x_BTC: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    y_BTC, _ = _fla(x_BTC).causal_conv1d(x_BTC, weight, bias, activation="silu", cu_seqlens=cu_seqlens)
    return y_BTC


class _States:
    """The states of the sequences that the tokens go on with; updated in place."""

    def __init__(self, state: State) -> None:
        self.state = state

    def convolve(self, name: str, conv: ShortConvolution, x_BTC: Tensor) -> Tensor:
        past_BPC = self.state[name]
        y_BTC = short_convolution(x_BTC, conv.weight, conv.bias, past_BPC=past_BPC)
        past_BPC.copy_(torch.cat((past_BPC, x_BTC.to(past_BPC.dtype)), dim=1)[:, -past_BPC.shape[1] :])
        return y_BTC

    def scan(self, mechanism: Mechanism, streams: tuple[Tensor, ...], *constants: Any) -> Tensor:
        states = tuple(self.state[name] for name in mechanism.states)
        o, new_states = mechanism.steps(*streams, *constants, states=states)
        for state, new_state in zip(states, new_states, strict=True):
            state.copy_(new_state)
        return o


class RecurrentAttention(Attention):
    """An attention whose past is a state of fixed size; positions come from the recurrence, not from RoPE.

    FSDP casts a block's parameters as one: in a bf16 run the gates' own parameters (a_log, dt_bias, ridge)
    enter the fp32 arithmetic of the gates rounded to bf16. The optimizer's values stay fp32.
    """

    has_graph_breaks = True

    @abstractmethod
    def mix(self, x_BTD: Tensor, past: Past) -> Tensor:
        """Mix every token with its past, `[B, T, D]` to `[B, T, D]`."""

    @abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """What is remembered of a sequence: a shape by name, for convolutions that of `conv_state`."""

    @abstractmethod
    def product_flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs per token of the mechanism's matrix products, as num_flops_per_token counts them."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See Attention.initial_value.

        Convolutions start as torch's do, uniform within 1 / sqrt(CONV_WIDTH), biases of projections at 0.
        """
        if "_conv." in name:
            return torch.empty(shape).uniform_(-(CONV_WIDTH**-0.5), CONV_WIDTH**-0.5, generator=generator)
        return torch.zeros(shape) if name.endswith(".bias") else None

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """See Attention.forward."""
        return self.mix(x_BTD, _Rows(cu_seqlens))

    def new_state(self, batch: int, max_seqlen: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """See Attention.new_state: all of it in at least fp32, whatever max_seqlen is."""
        dtype = torch.promote_types(dtype, torch.float32)
        return {
            name: torch.zeros(batch, *shape, device=device, dtype=dtype)
            for name, shape in self.state_shapes().items()
        }

    def prefill(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """See Attention.prefill."""
        return self.mix(x_BTD, _Rows(cu_seqlens, state))

    def extend(self, x_BTD: torch.Tensor, rope: Rope, state: State, lengths_B: torch.Tensor) -> torch.Tensor:
        """See Attention.extend."""
        return self.mix(x_BTD, _States(state))

    def num_flops_per_token(self, seq_len: int) -> float:
        """See Attention.num_flops_per_token: the projections, and the mechanism's products."""
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6.0 * linear + self.product_flops_per_token(seq_len)

    def num_cache_elements(self, seq_len: int) -> int:
        """See Attention.num_cache_elements: states and inputs of the convolutions, whatever seq_len is."""
        return sum(math.prod(shape) for shape in self.state_shapes().values())


def conv_state(conv: ShortConvolution) -> tuple[int, int]:
    """Shape of what a convolution remembers of a sequence: its last inputs."""
    return (CONV_WIDTH - 1, conv.weight.shape[0])


def mean_visible_in_chunk(seq_len: int) -> float:
    """Mean number of tokens of its own chunk that a token sees."""
    return mean_visible_keys(min(seq_len, _FLA_CHUNK_TOKENS), None)
