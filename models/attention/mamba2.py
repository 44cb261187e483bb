"""Mamba-2, with separate matrices for its five inputs, which the published code stacks into one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.recurrent.base import (
    STATE_SPACE,
    RecurrentAttention,
    ScanContext,
    ShortConvolution,
    conv_state_shape,
    mean_visible_keys_in_chunk,
)
from models.attention.recurrent.gates import initial_a_log, initial_dt_bias, log_decay_rate, step_size
from models.config import Mamba2Config
from models.sizes import ModelSize


class Mamba2(RecurrentAttention):
    """Mamba-2 (attention.kind "mamba2", Dao and Gu 2024), with B and C shared by all heads (one group).

    Mamba-2's z, x, B, C, dt are W_z x, W_v x, W_k x, W_q x, W_dt x here.

    Args:
        config: Options of the attention.
        size: Dimensions of the model; head_dim is the width of the values, num_kv_heads is not used.
        norm_eps: Epsilon of the RMSNorm of the output.
    """

    def __init__(self, config: Mamba2Config, size: ModelSize, norm_eps: float) -> None:
        super().__init__()
        self.config, self.size = config, size
        inner = size.num_heads * size.head_dim
        self.wq = nn.Linear(size.width, config.state_size, bias=False)
        self.wk = nn.Linear(size.width, config.state_size, bias=False)
        self.wv = nn.Linear(size.width, inner, bias=False)
        self.wz = nn.Linear(size.width, inner, bias=False)
        self.wdt = nn.Linear(size.width, size.num_heads, bias=False)
        self.wo = nn.Linear(inner, size.width, bias=False)
        self.q_conv = ShortConvolution(config.state_size, bias=True)
        self.k_conv = ShortConvolution(config.state_size, bias=True)
        self.v_conv = ShortConvolution(inner, bias=True)
        self.a_log = nn.Parameter(torch.empty(size.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(size.num_heads))
        self.skip = nn.Parameter(torch.empty(size.num_heads))
        self.o_norm = nn.RMSNorm(inner, eps=norm_eps)

    def mix(self, x_BTD: Tensor, context: ScanContext) -> Tensor:
        """See RecurrentAttention.mix."""
        num_heads = self.size.num_heads
        q_BTHS, k_BTHS = (
            stream.unsqueeze(2).expand(-1, -1, num_heads, -1)
            for stream in (
                context.convolve("q_conv", self.q_conv, self.wq(x_BTD)),
                context.convolve("k_conv", self.k_conv, self.wk(x_BTD)),
            )
        )
        v_BTHK = context.convolve("v_conv", self.v_conv, self.wv(x_BTD)).unflatten(-1, (num_heads, -1))
        step_BTH = step_size(self.wdt(x_BTD), self.dt_bias)
        update_BTHK = (step_BTH.unsqueeze(-1) * v_BTHK).to(v_BTHK.dtype)
        streams = (q_BTHS, k_BTHS, update_BTHK, log_decay_rate(self.a_log, step_BTH) * step_BTH)
        o_BTHK = context.scan(STATE_SPACE, streams) + self.skip.unsqueeze(-1) * v_BTHK
        return self.wo(self.o_norm(o_BTHK.flatten(2) * F.silu(self.wz(x_BTD))))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """See RecurrentAttention.state_shapes."""
        return {
            "q_conv": conv_state_shape(self.q_conv),
            "k_conv": conv_state_shape(self.k_conv),
            "v_conv": conv_state_shape(self.v_conv),
            "state": (self.size.num_heads, self.config.state_size, self.size.head_dim),
        }

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See RecurrentAttention.initial_value: decay rates 1 to 16, step sizes 0.001 to 0.1, a skip of 1."""
        if name == "a_log":
            return initial_a_log(shape, 1.0, generator)
        if name == "dt_bias":
            return initial_dt_bias(shape, generator)
        if name == "skip":
            return torch.ones(shape)
        return super().initial_value(name, shape, generator)

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token.

        Multiply-adds per head with a state of S x K forward: 2 S K for its update and its read, and S + K per
        visible token of the chunk, for the score and the sum of values. The kernels compute the scores in
        every head. The backward takes twice as many.
        """
        state_size, width = self.config.state_size, self.size.head_dim
        within = mean_visible_keys_in_chunk(seq_len) * (state_size + width)
        return 6.0 * self.size.num_heads * (2 * state_size * width + within)

    def num_saved_elements_per_token(self) -> int:
        """See Attention; an estimate from the tensors that fla's functions save.

        q, k and v before and after the convolutions, q and k expanded to all heads, the state updates, the
        output with and without the skip, the gate and its input, the gated and the normalized output.
        """
        state_size, inner = self.config.state_size, self.size.num_heads * self.size.head_dim
        return 4 * state_size + 2 * self.size.num_heads * state_size + 9 * inner
