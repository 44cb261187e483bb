"""Gated DeltaNet and Kimi Delta Attention in a block, parameterised as in flash-linear-attention."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.recurrent.base import (
    GATED_DELTA_RULE,
    Past,
    RecurrentAttention,
    ShortConvolution,
    conv_state,
    mean_visible_in_chunk,
)
from models.attention.recurrent.gates import initial_a_log, initial_dt_bias, rate, step_size
from models.config import GatedDeltaNetConfig
from models.sizes import ModelSize


class _DeltaNet(RecurrentAttention):
    """What both share: short convolutions of q, k and v, a rate of correction, a gated output."""

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
        """The logarithm of the decay, `[B, T, H, 1]` or `[B, T, H, K]`, at least fp32."""

    @abstractmethod
    def output_gate(self, x_BTD: Tensor) -> Tensor:
        """What multiplies the normalised output, `[B, T, H * V]`."""

    def mix(self, x_BTD: Tensor, past: Past) -> Tensor:
        """See RecurrentAttention.mix."""
        q, k, v = (
            past.convolve(name, conv, projection(x_BTD)).unflatten(-1, (self.size.num_heads, -1))
            for name, conv, projection in (
                ("q_conv", self.q_conv, self.wq),
                ("k_conv", self.k_conv, self.wk),
                ("v_conv", self.v_conv, self.wv),
            )
        )
        g_BTHJ = self.log_decay(x_BTD)
        beta_BTH = self.wb(x_BTD).to(g_BTHJ.dtype).sigmoid()
        o_BTHV = past.scan(GATED_DELTA_RULE, (q, k, v, g_BTHJ, beta_BTH))
        return self.wo(self.o_norm(o_BTHV).flatten(2) * self.output_gate(x_BTD))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """See RecurrentAttention.state_shapes."""
        return {
            "q_conv": conv_state(self.q_conv),
            "k_conv": conv_state(self.k_conv),
            "v_conv": conv_state(self.v_conv),
            "state": (self.size.num_heads, self.size.head_dim, self.value_dim),
        }

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See RecurrentAttention.initial_value: rates up to 16, step sizes from 0.001 to 0.1."""
        if name == "a_log":
            return initial_a_log(shape, self.lowest_rate, generator)
        if name == "dt_bias":
            return initial_dt_bias(shape, generator)
        return super().initial_value(name, shape, generator)

    def product_flops_per_token(self, seq_len: int) -> float:
        """See RecurrentAttention.product_flops_per_token.

        Forward, a head: 3 K V for what the state predicts, writing it and reading it, and 3 K + 2 V per
        visible token of the chunk: k.k, q.k, the corrections' two right-hand sides (K and V), the sum of
        values. Backward as much twice.
        """
        width_k, width_v = self.size.head_dim, self.value_dim
        within = mean_visible_in_chunk(seq_len) * (3 * width_k + 2 * width_v)
        return 6.0 * self.size.num_heads * (3 * width_k * width_v + within)

    def num_saved_elements_per_token(self) -> int:
        """See Attention; an estimate, from what fla's functions keep.

        q, k, v before and after the convolutions, the matrix of the chunk's system, the output, its gate, the
        normalised output and the gated one; decays in fp32 (two elements), as given and summed.
        """
        width_k, width_v, num_decays = self.size.head_dim, self.value_dim, self._num_decays()
        return self.size.num_heads * (4 * width_k + 6 * width_v + 64 + 4 * num_decays)

    def _num_decays(self) -> int:
        return 1


class GatedDeltaNet(_DeltaNet):
    """Gated DeltaNet (Yang et al. 2024): one decay a head, values expand_v times as wide as keys."""

    lowest_rate = 0.0

    def __init__(self, config: GatedDeltaNetConfig, size: ModelSize, norm_eps: float) -> None:
        """Build the projections.

        Args:
            config: Options of the mechanism.
            size: Dimensions of the model; head_dim is that of the keys, key/value heads are not used.
            norm_eps: Epsilon of the RMSNorm of each head's output.
        """
        super().__init__(size, config.expand_v * size.head_dim, norm_eps)
        self.wa = nn.Linear(size.width, size.num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(size.num_heads))
        self.wz = nn.Linear(size.width, size.num_heads * self.value_dim, bias=False)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """-exp(a_log) softplus(W_a x + dt_bias), `[B, T, H, 1]`."""
        step_BTH = step_size(self.wa(x_BTD), self.dt_bias)
        return (rate(self.a_log, step_BTH) * step_BTH).unsqueeze(-1)

    def output_gate(self, x_BTD: Tensor) -> Tensor:
        """silu(W_z x)."""
        return F.silu(self.wz(x_BTD))


class KimiDeltaAttention(_DeltaNet):
    """Kimi Delta Attention (Kimi Team 2025): a decay for every key channel, gates of low rank."""

    lowest_rate = 1.0

    def __init__(self, size: ModelSize, norm_eps: float) -> None:
        """Build the projections.

        Args:
            size: Dimensions of the model; keys and values have its head_dim, key/value heads are not used.
            norm_eps: Epsilon of the RMSNorm of each head's output.
        """
        super().__init__(size, size.head_dim, norm_eps)
        rank, width_k = size.head_dim, size.num_heads * size.head_dim
        self.wa_in = nn.Linear(size.width, rank, bias=False)
        self.wa_out = nn.Linear(rank, width_k, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(width_k))
        self.wz_in = nn.Linear(size.width, rank, bias=False)
        self.wz_out = nn.Linear(rank, width_k, bias=True)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """-exp(a_log) softplus(W_a x + dt_bias), `[B, T, H, K]`, with W_a of rank K."""
        step_BTC = step_size(self.wa_out(self.wa_in(x_BTD)), self.dt_bias)
        step_BTHK = step_BTC.unflatten(-1, (self.size.num_heads, -1))
        return rate(self.a_log, step_BTHK).unsqueeze(-1) * step_BTHK

    def output_gate(self, x_BTD: Tensor) -> Tensor:
        """sigmoid(W_z x + b), with W_z of rank K."""
        return self.wz_out(self.wz_in(x_BTD)).sigmoid()

    def _num_decays(self) -> int:
        return self.size.head_dim
