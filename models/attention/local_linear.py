"""Exact local linear attention in a block."""

import torch

from models.attention.base import HeadProjections, Rope
from models.config import LocalLinearConfig
from models.sizes import ModelSize
from parallax import local_linear_attention


class LocalLinearAttention(HeadProjections):
    """Softmax attention's projections; the probe is solved for every query (paper, section 2)."""

    def __init__(self, config: LocalLinearConfig, size: ModelSize, norm_eps: float) -> None:
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

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """See Attention.forward."""
        q, k, v = self.project(x_BTD, rope)
        o_BTHK = local_linear_attention(
            q,
            k,
            v,
            ridge=self.config.ridge,
            cu_seqlens=cu_seqlens,
            window_size=self.config.window_size,
            solver=self.config.solver,
            num_iterations=self.config.num_iterations,
        )
        return self.wo(o_BTHK.flatten(2))

    def num_flops_per_token(self, seq_len: int) -> float:
        """See Attention.num_flops_per_token.

        4 products forward (two scores, mean key, values) and 11 backward, 6 of the output and 5 of the probe;
        2 in each of the iterations of either direction, as if none stopped early, or K for the matrices that
        the direct solver forms. Their factorisation is not counted.
        """
        config = self.config
        num_products = 15 + (4 * config.num_iterations if config.solver == "cg" else self.size.head_dim)
        return self.projection_flops_per_token() + self.product_flops_per_token(
            num_products, seq_len, config.window_size
        )

    def num_saved_elements_per_token(self) -> int:
        """See Attention: q, k, v and the probe are kept in fp32, two elements of 16 bits each."""
        size = self.size
        extra = (3 * size.num_heads + 2 * size.num_kv_heads) * size.head_dim
        return super().num_saved_elements_per_token() + extra

    def num_cache_elements(self, seq_len: int) -> int:
        """See Attention.num_cache_elements: keys and values, no more tokens than the window has."""
        window_size = self.config.window_size
        return super().num_cache_elements(seq_len if window_size is None else min(seq_len, window_size))
