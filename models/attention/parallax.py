"""Parallax attention in a block: the probe is projected, normalised, rotated and gated."""

import torch
from torch import nn

from models.attention.base import HeadProjections, Rope
from models.config import ParallaxConfig
from models.sizes import ModelSize
from parallax import parallax_attention


class ParallaxAttention(HeadProjections):
    """Softmax attention plus the covariance correction, o = vbar - Sigma_KV rho (paper, section 1)."""

    def __init__(self, config: ParallaxConfig, size: ModelSize, norm_eps: float) -> None:
        """Build the projections.

        Args:
            config: Options of the mechanism.
            size: Dimensions of the model.
            norm_eps: Epsilon of the RMSNorm of each head.

        Raises:
            ValueError: As in HeadProjections.
        """
        super().__init__(size, norm_eps)
        self.config = config
        self.wr = nn.Linear(size.width, size.num_heads * size.head_dim, bias=False)
        if config.r_norm:
            self.r_norm = nn.RMSNorm(size.head_dim, eps=norm_eps)
        if config.gate is not None:
            self.wg = nn.Linear(size.width, size.num_heads if config.gate == "head" else 1, bias=False)

    def probe(self, x_BTD: torch.Tensor, rope: Rope) -> torch.Tensor:
        """The probe rho = g * rope(norm(W_R x)), `[B, T, H, K]`."""
        r_BTHK = self.split_heads(self.wr(x_BTD))
        if self.config.r_norm:
            r_BTHK = self.r_norm(r_BTHK)
        if self.config.rope_on_r:
            r_BTHK = rope(r_BTHK)
        if self.config.gate is not None:
            r_BTHK = r_BTHK * torch.sigmoid(self.wg(x_BTD)).unsqueeze(-1)
        return r_BTHK

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """See Attention.forward."""
        q, k, v = self.project(x_BTD, rope)
        o_BTHK = parallax_attention(
            q,
            self.probe(x_BTD, rope),
            k,
            v,
            cu_seqlens=cu_seqlens,
            window_size=self.config.window_size,
            impl=self.config.impl,
        )
        return self.wo(o_BTHK.flatten(2))

    def num_flops_per_token(self, seq_len: int) -> float:
        """See Attention.num_flops_per_token.

        4 products forward (two scores, two sums of values) and 6 backward: dO V^T, dV, dQ, dR and two for dK.
        """
        return self.projection_flops_per_token() + self.product_flops_per_token(
            10, seq_len, self.config.window_size
        )

    def num_saved_elements_per_token(self) -> int:
        """See Attention: besides, r as projected and as rotated, and vbar."""
        return super().num_saved_elements_per_token() + 3 * self.size.num_heads * self.size.head_dim
