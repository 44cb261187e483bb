"""Attention with uniform weights, from running sums (paper, section 2)."""

from abc import abstractmethod
from itertools import pairwise

import torch
from torch import nn

from models.attention.base import Attention, HeadProjections, Rope, State
from models.config import AffineLinearConfig, AffineMesaNetConfig, LinearConfig
from models.sizes import ModelSize
from parallax import affine_linear_attention, affine_mesanet, linear_attention, value_average
from parallax.affine_state import add_keys, affine_output, linear_output, mesanet_output
from parallax.causal_product import CHUNK_TOKENS


def _new_sums(
    size: ModelSize, names: tuple[str, ...], batch: int, device: torch.device, dtype: torch.dtype
) -> State:
    """Allocate zero sums, named as in parallax.affine_state, at least fp32."""
    dtype = torch.promote_types(dtype, torch.float32)
    heads, width = size.num_kv_heads, size.head_dim
    shapes = {"v": (width,), "k": (width,), "vk": (width, width), "kk": (width, width)}
    return {name: torch.zeros(batch, heads, *shapes[name], device=device, dtype=dtype) for name in names}


class ValueAverage(Attention):
    """The mean of the past values (attention.kind "value-average"), without queries and keys.

    Args:
        size: Dimensions of the model; its query heads are not used.
    """

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.wv = nn.Linear(size.width, size.num_kv_heads * size.head_dim, bias=False)
        self.wo = nn.Linear(size.num_kv_heads * size.head_dim, size.width, bias=False)

    def output(self, o_BTGK: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """See HeadProjections.output."""
        return self.wo(o_BTGK.flatten(2))

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """See Attention.forward."""
        v_BTGK = self.wv(x_BTD).unflatten(-1, (-1, self.size.head_dim))
        return self.output(value_average(v_BTGK, cu_seqlens=cu_seqlens), x_BTD)

    def new_state(self, batch: int, max_seqlen: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """See Attention.new_state: the sum of the values."""
        return _new_sums(self.size, ("v",), batch, device, dtype)

    def prefill(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """See Attention.prefill."""
        v_BTGK = self.wv(x_BTD).unflatten(-1, (-1, self.size.head_dim))
        for row, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            add_keys(state, None, v_BTGK[:, start:stop], slice(row, row + 1))
        return self.output(value_average(v_BTGK, cu_seqlens=cu_seqlens), x_BTD)

    def extend(self, x_BTD: torch.Tensor, rope: Rope, state: State, lengths_B: torch.Tensor) -> torch.Tensor:
        """See Attention.extend."""
        v_BTGK = self.wv(x_BTD).unflatten(-1, (-1, self.size.head_dim))
        outputs, num_tokens = [], x_BTD.shape[1]
        for index in range(num_tokens):
            add_keys(state, None, v_BTGK[:, index : index + 1])
            outputs.append(state["v"] / (lengths_B - num_tokens + index + 1)[:, None, None])
        return self.output(torch.stack(outputs, 1).to(x_BTD.dtype), x_BTD)

    def projection_flops_per_token(self) -> float:
        """See Attention.projection_flops_per_token."""
        return 6.0 * sum(p.numel() for p in self.parameters())

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token: none, since a running sum is not a product."""
        return 0.0

    def num_saved_elements_per_token(self) -> int:
        """See Attention: the means."""
        return self.size.num_kv_heads * self.size.head_dim

    def num_cache_elements(self, seq_len: int) -> int:
        """See Attention.num_cache_elements: the sum of the values."""
        return self.size.num_kv_heads * self.size.head_dim


class _RunningSumAttention(HeadProjections):
    """Attention whose decoding state are running sums over keys and values."""

    sums: tuple[str, ...]

    @abstractmethod
    def attend(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGK: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute attention over whole documents, `[B, T, H, K]`."""

    @abstractmethod
    def attend_sums(self, sums: State, counts_B: torch.Tensor, q_BHK: torch.Tensor) -> torch.Tensor:
        """Compute attention of one query per sequence from the sums over its counts_B keys, `[B, H, K]`."""

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """See Attention.forward."""
        return self.output(self.attend(*self.project(x_BTD, rope), cu_seqlens), x_BTD)

    def new_state(self, batch: int, max_seqlen: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """See Attention.new_state: the sums over the past."""
        return _new_sums(self.size, self.sums, batch, device, dtype)

    def prefill(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """See Attention.prefill."""
        q, k, v = self.project(x_BTD, rope)
        for row, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            add_keys(state, k[:, start:stop], v[:, start:stop], slice(row, row + 1))
        return self.output(self.attend(q, k, v, cu_seqlens), x_BTD)

    def extend(self, x_BTD: torch.Tensor, rope: Rope, state: State, lengths_B: torch.Tensor) -> torch.Tensor:
        """See Attention.extend."""
        q, k, v = self.project(x_BTD, rope)
        outputs, num_tokens = [], x_BTD.shape[1]
        for index in range(num_tokens):
            add_keys(state, k[:, index : index + 1], v[:, index : index + 1])
            outputs.append(self.attend_sums(state, lengths_B - num_tokens + index + 1, q[:, index]))
        return self.output(torch.stack(outputs, 1).to(x_BTD.dtype), x_BTD)

    def causal_product_flops_per_token(self, num_products: int, seq_len: int) -> float:
        """Count the FLOPs per token of chunked causal products: state updates and reads, scores in chunks."""
        size = self.size
        states = 2.0 * num_products * (size.num_heads + size.num_kv_heads) * size.head_dim**2
        return states + self.causal_flops_per_token(2 * num_products, min(seq_len, CHUNK_TOKENS), None)

    def num_saved_elements_per_token(self) -> int:
        """See Attention: also q, k, v in fp32 (two 16-bit elements each), q and k with one more column."""
        size = self.size
        extra = (3 * size.num_heads + 4 * size.num_kv_heads) * size.head_dim
        return super().num_saved_elements_per_token() + extra


class LinearAttention(_RunningSumAttention):
    """Linear attention (attention.kind "linear"), or with an intercept ("affine-linear").

    Without a softmax the query only serves as the probe: W_Q projects it, with its norm and RoPE, and the
    parameters are those of softmax attention. Its scale is softmax attention's 1 / sqrt(K), our choice:
    without it the output at the first token of a document would be K times its value.

    Args:
        config: Chooses between the two.
        size: Dimensions of the model.
        norm_eps: Epsilon of the RMSNorm of each head.

    Raises:
        UserError: As HeadProjections.
    """

    def __init__(self, config: LinearConfig | AffineLinearConfig, size: ModelSize, norm_eps: float) -> None:
        super().__init__(size, norm_eps)
        self.is_affine = isinstance(config, AffineLinearConfig)
        self.sums = ("v", "k", "vk") if self.is_affine else ("vk",)

    def attend(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGK: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        """See _RunningSumAttention.attend."""
        attend = affine_linear_attention if self.is_affine else linear_attention
        return attend(q_BTHK * self.size.head_dim**-0.5, k_BTGK, v_BTGK, cu_seqlens=cu_seqlens)

    def attend_sums(self, sums: State, counts_B: torch.Tensor, q_BHK: torch.Tensor) -> torch.Tensor:
        """See _RunningSumAttention.attend_sums."""
        attend = affine_output if self.is_affine else linear_output
        return attend(sums, counts_B, q_BHK * self.size.head_dim**-0.5)

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token: one causal product forward, two backward."""
        return self.causal_product_flops_per_token(3, seq_len)

    def num_cache_elements(self, seq_len: int) -> int:
        """See Attention.num_cache_elements: the sum of v k^T; with an intercept also those of v and k."""
        width = self.size.head_dim
        return self.size.num_kv_heads * (width**2 + (2 * width if self.is_affine else 0))


class AffineMesaNet(_RunningSumAttention):
    """Affine MesaNet (attention.kind "affine-mesanet"): local linear attention with uniform weights.

    Args:
        config: Options of the attention.
        size: Dimensions of the model.
        norm_eps: Epsilon of the RMSNorm of each head.

    Raises:
        UserError: As HeadProjections.
    """

    supports_cuda_graph = False  # conjugate gradients check for convergence on the host
    sums = ("v", "k", "vk", "kk")

    def __init__(self, config: AffineMesaNetConfig, size: ModelSize, norm_eps: float) -> None:
        super().__init__(size, norm_eps)
        self.config = config

    def attend(
        self,
        q_BTHK: torch.Tensor,
        k_BTGK: torch.Tensor,
        v_BTGK: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        """See _RunningSumAttention.attend."""
        ridge, num_iterations = self.config.ridge, self.config.num_iterations
        return affine_mesanet(
            q_BTHK, k_BTGK, v_BTGK, ridge=ridge, cu_seqlens=cu_seqlens, num_iterations=num_iterations
        )

    def attend_sums(self, sums: State, counts_B: torch.Tensor, q_BHK: torch.Tensor) -> torch.Tensor:
        """See _RunningSumAttention.attend_sums."""
        return mesanet_output(sums, counts_B, q_BHK, self.config.ridge, self.config.num_iterations)

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token.

        One causal product for the output and one per iteration in either direction, as if no query converged
        early; two for the gradient of the output, two for that of the probe.
        """
        num_products = 2 * self.config.num_iterations + 5
        return self.causal_product_flops_per_token(num_products, seq_len)

    def num_saved_elements_per_token(self) -> int:
        """See Attention: also the probe, in fp32."""
        return super().num_saved_elements_per_token() + 2 * self.size.num_heads * self.size.head_dim

    def num_cache_elements(self, seq_len: int) -> int:
        """See Attention.num_cache_elements: the sums of v k^T, k k^T, v and k."""
        return self.size.num_kv_heads * 2 * (self.size.head_dim**2 + self.size.head_dim)
