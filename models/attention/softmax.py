"""Softmax attention by the kernels of Parallax attention, which differ by the correction alone."""

import torch

from models.attention.base import State
from models.attention.key_values import KeyValueAttention, decode_impl
from models.attention.torch_softmax import torch_softmax_attention
from models.config import SoftmaxConfig
from models.sizes import ModelSize
from parallax import parallax_attention, parallax_decode
from parallax.kernels.tiles import HEAD_DIMS


class SoftmaxAttention(KeyValueAttention):
    """Softmax attention, that of Qwen3 (attention.kind "softmax").

    Args:
        config: Options of the attention.
        size: Dimensions of the model.
        norm_eps: Epsilon of the RMSNorm of each head.

    Raises:
        UserError: As HeadProjections.
    """

    def __init__(self, config: SoftmaxConfig, size: ModelSize, norm_eps: float) -> None:
        super().__init__(size, norm_eps)
        self.config = config
        self.window_size = config.window_size
        self.forward_supports_cuda_graph = config.impl in (None, "triton") and size.head_dim in HEAD_DIMS

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
        window_size, impl = self.window_size, self.config.impl
        if impl == "torch":
            return torch_softmax_attention(q_BTHK, k_BTGK, v_BTGK, cu_seqlens, max_seqlen, window_size)
        return parallax_attention(
            q_BTHK, None, k_BTGK, v_BTGK, cu_seqlens=cu_seqlens, window_size=window_size, impl=impl
        )

    def attend_cached(
        self, q_BTHK: torch.Tensor, r_BTHK: torch.Tensor | None, state: State, num_keys_B: torch.Tensor
    ) -> torch.Tensor:
        """See KeyValueAttention.attend_cached."""
        impl = decode_impl(self.config.impl)
        return parallax_decode(q_BTHK, None, state["k"], state["v"], cache_seqlens=num_keys_B, impl=impl)

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token: 2 products forward, 4 backward."""
        return self.causal_flops_per_token(6, seq_len, self.config.window_size)
