"""Parallax attention: the probe r is projected, normalized, rotated and gated."""

import torch
from torch import nn

from models.attention.base import Rope, State, normalize_heads
from models.attention.key_values import KeyValueAttention, decode_impl
from models.config import ParallaxConfig
from models.sizes import ModelSize
from parallax import parallax_attention, parallax_decode
from parallax.kernels.tiles import HEAD_DIMS


class ParallaxAttention(KeyValueAttention):
    """Parallax attention (attention.kind "parallax"), o = vbar - Sigma_KV rho (paper, section 1).

    Args:
        config: Options of the attention.
        size: Dimensions of the model.
        norm_eps: Epsilon of the RMSNorm of each head.

    Raises:
        UserError: As HeadProjections.
    """

    def __init__(self, config: ParallaxConfig, size: ModelSize, norm_eps: float) -> None:
        super().__init__(size, norm_eps)
        self.config = config
        self.window_size = config.window_size
        self.forward_supports_cuda_graph = config.impl in (None, "triton") and size.head_dim in HEAD_DIMS
        num_probes = size.num_kv_heads if config.r_heads == "kv" else size.num_heads
        if config.r_rank is None:
            self.wr = nn.Linear(size.width, num_probes * size.head_dim, bias=False)
        else:
            self.wr_in = nn.Linear(size.width, config.r_rank, bias=False)
            self.wr_out = nn.Linear(config.r_rank, num_probes * size.head_dim, bias=False)
        if config.r_norm:
            self.r_norm = nn.RMSNorm(size.head_dim, eps=norm_eps)
        if config.gate is not None:
            self.wg = nn.Linear(size.width, size.num_heads if config.gate == "head" else 1, bias=False)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor | None:
        """See Attention.initial_value: the probe's gain, and a wr_out by which wr_out wr_in has init_std."""
        if name == "r_norm.weight":
            return torch.full(shape, self.config.r_gain_init)
        if name == "wr_out.weight":
            return torch.empty(shape).normal_(0.0, shape[1] ** -0.5, generator=generator)
        return None

    def probe(self, x_BTD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Compute the probe rho = g * r_scale * rope(norm(W_R x)), `[B, T, H, K]`."""
        config = self.config
        r_BTHK = self.split_heads(self.wr(x_BTD) if config.r_rank is None else self.wr_out(self.wr_in(x_BTD)))
        if config.r_norm:
            r_BTHK = normalize_heads(r_BTHK, self.r_norm, rope if config.rope_on_r else None)
        elif config.rope_on_r:
            r_BTHK = rope(r_BTHK)
        if config.r_scale != 1.0:
            r_BTHK = r_BTHK * config.r_scale
        if config.r_heads == "kv":
            r_BTHK = r_BTHK.repeat_interleave(self.size.num_heads // self.size.num_kv_heads, dim=2)
        if config.gate is not None:
            r_BTHK = r_BTHK * self.openness(x_BTD).unsqueeze(-1)
        return r_BTHK

    def openness(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Compute the gate of the probe, `[B, T, H]`, or `[B, T, 1]` for one per token."""
        return torch.sigmoid(self.wg(x_BTD))

    def attend(
        self,
        q_BTHK: torch.Tensor,
        r_BTHK: torch.Tensor | None,
        k_BTGK: torch.Tensor,
        v_BTGK: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int,
    ) -> torch.Tensor:
        """See KeyValueAttention.attend."""
        assert r_BTHK is not None
        window_size, impl = self.window_size, self.config.impl
        return parallax_attention(
            q_BTHK, r_BTHK, k_BTGK, v_BTGK, cu_seqlens=cu_seqlens, window_size=window_size, impl=impl
        )

    def attend_cached(
        self, q_BTHK: torch.Tensor, r_BTHK: torch.Tensor | None, state: State, num_keys_B: torch.Tensor
    ) -> torch.Tensor:
        """See KeyValueAttention.attend_cached."""
        impl = decode_impl(self.config.impl)
        return parallax_decode(q_BTHK, r_BTHK, state["k"], state["v"], cache_seqlens=num_keys_B, impl=impl)

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token.

        4 products forward (scores of q and r, two sums of values) and 6 backward: dO V^T, dV, dQ, dR and two
        for dK. The kernels compute them in every query head, even if query heads share a probe.
        """
        return self.causal_flops_per_token(10, seq_len, self.config.window_size)

    def num_saved_elements_per_token(self) -> int:
        """See Attention: those of HeadProjections, vbar, and those of the probe.

        Those are r as input of the attention; the input of its norm; the gate and its input; and the output
        of wr_in.
        """
        config, size = self.config, self.size
        num_probes = size.num_kv_heads if config.r_heads == "kv" else size.num_heads
        num_saved = int(config.r_norm) + int(config.gate is not None)
        elements = (2 * size.num_heads + num_saved * num_probes) * size.head_dim + (config.r_rank or 0)
        if config.gate is not None:
            elements += size.num_heads if config.gate == "head" else 1
        return super().num_saved_elements_per_token() + elements
