"""Exact local linear attention."""

import torch

from models.attention.base import State
from models.attention.key_values import KeyValueAttention
from models.config import LocalLinearConfig
from models.sizes import ModelSize
from parallax import local_linear_attention, local_linear_decode


class LocalLinearAttention(KeyValueAttention):
    """Local linear attention (attention.kind "lla"): Parallax with a solved probe (paper, section 2).

    Args:
        config: Options of the attention.
        size: Dimensions of the model.
        norm_eps: Epsilon of the RMSNorm of each head.

    Raises:
        UserError: As HeadProjections.
    """

    supports_cuda_graph = False  # conjugate gradients check for convergence on the host

    def __init__(self, config: LocalLinearConfig, size: ModelSize, norm_eps: float) -> None:
        super().__init__(size, norm_eps)
        self.config = config
        self.window_size = config.window_size

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
        return local_linear_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            ridge=self.config.ridge,
            cu_seqlens=cu_seqlens,
            window_size=self.window_size,
            solver=self.config.solver,
            num_iterations=self.config.num_iterations,
        )

    def attend_cached(
        self, q_BTHK: torch.Tensor, r_BTHK: torch.Tensor | None, state: State, num_keys_B: torch.Tensor
    ) -> torch.Tensor:
        """See KeyValueAttention.attend_cached; always by conjugate gradients, exact after K iterations."""
        config = self.config
        return local_linear_decode(
            q_BTHK,
            state["k"],
            state["v"],
            cache_seqlens=num_keys_B,
            ridge=config.ridge,
            num_iterations=config.num_iterations if config.solver == "cg" else self.size.head_dim,
        )

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token.

        4 products forward (two scores, mean key, values) and 11 backward, 6 for the output and 5 for the
        probe; 2 per iteration in either direction, as if no query converged early, or K for the matrices of
        the direct solver, whose factorization is not counted.
        """
        config = self.config
        num_products = 15 + (4 * config.num_iterations if config.solver == "cg" else self.size.head_dim)
        return self.causal_flops_per_token(num_products, seq_len, config.window_size)

    def num_saved_elements_per_token(self) -> int:
        """See Attention: q, k, v, the probe, o and vbar in fp32, counted as two 16-bit elements each."""
        size = self.size
        extra = (7 * size.num_heads + 2 * size.num_kv_heads) * size.head_dim
        return super().num_saved_elements_per_token() + extra
