"""Gated DeltaNet and Kimi Delta Attention, parameterized as in flash-linear-attention."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.recurrent.base import (
    GATED_DELTA_RULE,
    RecurrentAttention,
    ScanContext,
    ShortConvolution,
    conv_state_shape,
    mean_visible_keys_in_chunk,
)
from models.attention.recurrent.gates import initial_a_log, initial_dt_bias, log_decay_rate, step_size
from models.config import GatedDeltaNetConfig
from models.sizes import ModelSize


class _DeltaNet(RecurrentAttention):
    """The gated delta rule with short convolutions of q, k and v, a learning rate and an output gate.

    Attributes:
        lowest_rate: Lower end of the initial decay rates exp(a_log).
    """

    lowest_rate: float

    def __init__(self, size: ModelSize, value_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.size, self.value_dim = size, value_dim
        width_k, width_v = size.num_heads * size.head_dim, size.num_heads * value_dim
        self.wq = nn.Linear(size.width, width_k, bias=False)
        self.wk = nn.Linear(size.width, width_k, bias=False)
        self.wv = nn.Linear(size.width, width_v, bias=False)
        self.wo = nn.Linear(width_v, size.width, bias=False)
        self.wb = nn.Linear(size.width, size.num_heads, bias=False)
        self.q_conv = ShortConvolution(width_k)
        self.k_conv = ShortConvolution(width_k)
        self.v_conv = ShortConvolution(width_v)
        self.a_log = nn.Parameter(torch.empty(size.num_heads))
        self.o_norm = nn.RMSNorm(value_dim, eps=norm_eps)

    @abstractmethod
    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """Compute the logarithm of the decay, `[B, T, H, 1]` or `[B, T, H, K]`, at least fp32."""

    @abstractmethod
    def output_gate(self, x_BTD: Tensor) -> Tensor:
        """Compute the gate of the normalized output, `[B, T, H * V]`."""

    def mix(self, x_BTD: Tensor, context: ScanContext) -> Tensor:
        """See RecurrentAttention.mix."""
        q, k, v = (
            context.convolve(name, conv, projection(x_BTD)).unflatten(-1, (self.size.num_heads, -1))
            for name, conv, projection in (
                ("q_conv", self.q_conv, self.wq),
                ("k_conv", self.k_conv, self.wk),
                ("v_conv", self.v_conv, self.wv),
            )
        )
        g_BTHJ = self.log_decay(x_BTD)
        beta_BTH = self.wb(x_BTD).to(g_BTHJ.dtype).sigmoid()
        o_BTHV = context.scan(GATED_DELTA_RULE, (q, k, v, g_BTHJ, beta_BTH))
        return self.wo(self.o_norm(o_BTHV).flatten(2) * self.output_gate(x_BTD))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """See RecurrentAttention.state_shapes."""
        return {
            "q_conv": conv_state_shape(self.q_conv),
            "k_conv": conv_state_shape(self.k_conv),
            "v_conv": conv_state_shape(self.v_conv),
            "state": (self.size.num_heads, self.size.head_dim, self.value_dim),
        }

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See RecurrentAttention.initial_value: decay rates up to 16, step sizes from 0.001 to 0.1."""
        if name == "a_log":
            return initial_a_log(shape, self.lowest_rate, generator)
        if name == "dt_bias":
            return initial_dt_bias(shape, generator)
        return super().initial_value(name, shape, generator)

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token.

        Multiply-adds per head forward: 3 K V for the state's prediction, its update and its read, and
        3 K + 2 V per visible token of the chunk: k.k, q.k, the system's right-hand sides (K and V), the sum
        of values. The backward takes twice as many.
        """
        width_k, width_v = self.size.head_dim, self.value_dim
        within = mean_visible_keys_in_chunk(seq_len) * (3 * width_k + 2 * width_v)
        return 6.0 * self.size.num_heads * (3 * width_k * width_v + within)

    def num_saved_elements_per_token(self) -> int:
        """See Attention; an estimate from the tensors that fla's functions save.

        q, k, v before and after the convolutions, the matrix of the chunk's system, the output, its gate, the
        normalized and the gated output; decays and their cumulative sums in fp32 (two 16-bit elements each).
        """
        width_k, width_v, num_decays = self.size.head_dim, self.value_dim, self._num_decays()
        return self.size.num_heads * (4 * width_k + 6 * width_v + 64 + 4 * num_decays)

    def _num_decays(self) -> int:
        return 1


class GatedDeltaNet(_DeltaNet):
    """Gated DeltaNet (attention.kind "gated-deltanet", Yang et al. 2024): one decay per head.

    Args:
        config: Options of the attention.
        size: Dimensions of the model; head_dim is the width of the keys, num_kv_heads is not used.
        norm_eps: Epsilon of the RMSNorm of each head's output.
    """

    lowest_rate = 0.0

    def __init__(self, config: GatedDeltaNetConfig, size: ModelSize, norm_eps: float) -> None:
        super().__init__(size, config.expand_v * size.head_dim, norm_eps)
        self.wa = nn.Linear(size.width, size.num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(size.num_heads))
        self.wz = nn.Linear(size.width, size.num_heads * self.value_dim, bias=False)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """Compute -exp(a_log) softplus(W_a x + dt_bias), `[B, T, H, 1]`."""
        step_BTH = step_size(self.wa(x_BTD), self.dt_bias)
        return (log_decay_rate(self.a_log, step_BTH) * step_BTH).unsqueeze(-1)

    def output_gate(self, x_BTD: Tensor) -> Tensor:
        """Compute silu(W_z x)."""
        return F.silu(self.wz(x_BTD))


class KimiDeltaAttention(_DeltaNet):
    """Kimi Delta Attention (attention.kind "kda", Kimi Team 2025): one decay per key channel, low-rank gates.

    Args:
        size: Dimensions of the model; head_dim is the width of keys and values, num_kv_heads is not used.
        norm_eps: Epsilon of the RMSNorm of each head's output.
    """

    lowest_rate = 1.0

    def __init__(self, size: ModelSize, norm_eps: float) -> None:
        super().__init__(size, size.head_dim, norm_eps)
        rank, width_k = size.head_dim, size.num_heads * size.head_dim
        self.wa_in = nn.Linear(size.width, rank, bias=False)
        self.wa_out = nn.Linear(rank, width_k, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(width_k))
        self.wz_in = nn.Linear(size.width, rank, bias=False)
        self.wz_out = nn.Linear(rank, width_k, bias=True)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """Compute -exp(a_log) softplus(W_a x + dt_bias), `[B, T, H, K]`, with W_a of rank K."""
        step_BTC = step_size(self.wa_out(self.wa_in(x_BTD)), self.dt_bias)
        step_BTHK = step_BTC.unflatten(-1, (self.size.num_heads, -1))
        return log_decay_rate(self.a_log, step_BTHK).unsqueeze(-1) * step_BTHK

    def output_gate(self, x_BTD: Tensor) -> Tensor:
        """Compute sigmoid(W_z x + b), with W_z of rank K."""
        return self.wz_out(self.wz_in(x_BTD)).sigmoid()

    def _num_decays(self) -> int:
        return self.size.head_dim
