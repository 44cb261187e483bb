"""MesaNet, parameterized as in flash-linear-attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.recurrent.base import (
    MESA,
    RecurrentAttention,
    ScanContext,
    ShortConvolution,
    conv_state_shape,
    mean_visible_keys_in_chunk,
)
from models.config import MesaNetConfig
from models.sizes import ModelSize

_MIN_RIDGE = 0.25
_INITIAL_RIDGE = 1.0


class MesaNet(RecurrentAttention):
    """MesaNet (attention.kind "mesanet", von Oswald et al. 2025): ridge regression solved for every query.

    Args:
        config: Options of the attention.
        size: Dimensions of the model; num_kv_heads is not used.
        norm_eps: Epsilon of the RMSNorm of each head's output.
    """

    def __init__(self, config: MesaNetConfig, size: ModelSize, norm_eps: float) -> None:
        super().__init__()
        self.config, self.size = config, size
        width = size.num_heads * size.head_dim
        self.wq = nn.Linear(size.width, width, bias=False)
        self.wk = nn.Linear(size.width, width, bias=False)
        self.wv = nn.Linear(size.width, width, bias=False)
        self.wo = nn.Linear(width, size.width, bias=False)
        self.wa = nn.Linear(size.width, size.num_heads)
        self.wb = nn.Linear(size.width, size.num_heads)
        self.q_conv = ShortConvolution(width)
        self.k_conv = ShortConvolution(width)
        self.ridge = nn.Parameter(torch.empty(width))
        self.o_norm = nn.RMSNorm(size.head_dim, eps=norm_eps)

    def mix(self, x_BTD: Tensor, context: ScanContext) -> Tensor:
        """See RecurrentAttention.mix."""
        q, k, v = (
            stream.unflatten(-1, (self.size.num_heads, -1))
            for stream in (
                context.convolve("q_conv", self.q_conv, self.wq(x_BTD)),
                context.convolve("k_conv", self.k_conv, self.wk(x_BTD)),
                self.wv(x_BTD),
            )
        )
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        g_BTH, beta_BTH = F.logsigmoid(self.wa(x_BTD).to(dtype)), self.wb(x_BTD).to(dtype).sigmoid()
        ridge_HK = (F.softplus(self.ridge.to(dtype)) + _MIN_RIDGE).unflatten(-1, (self.size.num_heads, -1))
        o_BTHK = context.scan(MESA, (q, k, v, g_BTH, beta_BTH), ridge_HK, self.config.num_iterations)
        return self.wo(self.o_norm(o_BTHK).flatten(2))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """See RecurrentAttention.state_shapes."""
        square = (self.size.num_heads, self.size.head_dim, self.size.head_dim)
        convs = {"q_conv": conv_state_shape(self.q_conv), "k_conv": conv_state_shape(self.k_conv)}
        return {**convs, "key_state": square, "value_state": square}

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """See RecurrentAttention.initial_value: a ridge of 1."""
        if name == "ridge":
            return torch.full(shape, math.log(math.expm1(_INITIAL_RIDGE - _MIN_RIDGE)))
        return super().initial_value(name, shape, generator)

    def product_flops_per_token(self, seq_len: int) -> float:
        """See Attention.product_flops_per_token.

        Multiply-adds per head: a product with a state (K K) and a chunk (2 K per visible token) per iteration
        in either direction, as if no query converged early, and one for the output; two state updates. The
        backward takes two products for the output, two for the matrix, and the state updates twice.
        """
        width = self.size.head_dim
        product = width**2 + 2 * width * mean_visible_keys_in_chunk(seq_len)
        num_products = 2 * self.config.num_iterations + 3 + 2
        return 2.0 * self.size.num_heads * (num_products * product + 3 * 2 * width**2)

    def num_saved_elements_per_token(self) -> int:
        """See Attention; an estimate from the tensors that fla's functions save.

        q and k before the convolutions, before and after the L2 normalization, v, the solution, the output
        twice, and normalized.
        """
        return 11 * self.size.num_heads * self.size.head_dim
