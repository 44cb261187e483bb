"""The contract of attention modules, and the projections with QK-norm and RoPE that many of them share.

Letters: B batch, T tokens, D width, H query heads, G key/value heads, K head width.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from errors import UnsupportedError, UserError
from models.kernels import norm_rope
from models.sizes import ModelSize

State = dict[str, torch.Tensor]
"""The decoding state of an attention module (KV cache or recurrent states): tensors `[B, ...]` by name."""


class Attention(nn.Module, ABC):
    """An attention module: mixes every token with the past of its document, and decodes.

    It also counts its own FLOPs, activations and cache.

    Attributes:
        has_graph_breaks: Whether torch.compile breaks forward into several graphs.
        supports_cuda_graph: Whether extend can be captured in a CUDA graph.
        forward_supports_cuda_graph: Whether forward and its backward can: on a GPU they neither wait for the
            device nor have shapes that depend on the documents' lengths, and documents may be empty.
    """

    has_graph_breaks: bool = False
    supports_cuda_graph: bool = True
    forward_supports_cuda_graph: bool = False

    @abstractmethod
    def forward(
        self, x_BTD: torch.Tensor, rope: "Rope", cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """Mix every token with the past of its document.

        Args:
            x_BTD: Normalized input `[B, T, D]`.
            rope: Rotary embedding of the T positions.
            cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1; None for B rows of one document.
            max_seqlen: An upper bound on the length of a document.

        Returns:
            The output `[B, T, D]`, before the residual connection.
        """

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor | None:
        """Return the initial value of a parameter that models/init.py should not draw by its own rules.

        Args:
            name: The parameter's name in this module.
            shape: Its global shape.
            generator: Used for this parameter only; seeded by the run's seed and the parameter's name.

        Returns:
            The whole tensor, fp32, on the CPU; None for the rules of models/init.py, which cover matrices and
            gains of norms.
        """
        return None

    def new_state(self, batch: int, max_seqlen: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """Allocate the decoding state of empty sequences.

        Args:
            batch: Number of sequences B.
            max_seqlen: Maximum length of a sequence.
            device: Device of the state.
            dtype: The weights' dtype; sums over the past may be stored in fp32.

        Returns:
            Tensors `[B, ...]`, num_cache_elements(max_seqlen) elements per sequence.

        Raises:
            UnsupportedError: The module does not decode.
        """
        raise UnsupportedError(f"{type(self).__name__} does not support decoding")

    def prefill(
        self, x_BTD: torch.Tensor, rope: "Rope", cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """Compute forward over packed prompts (B = 1), and store prompt n in row n of an empty state.

        Args and returns as forward, and the state from new_state, filled in place; no prompt is empty.

        Raises:
            UnsupportedError: The module does not decode.
        """
        raise UnsupportedError(f"{type(self).__name__} does not support decoding")

    def extend(
        self, x_BTD: torch.Tensor, rope: "Rope", state: State, lengths_B: torch.Tensor
    ) -> torch.Tensor:
        """Mix T new tokens of each sequence with its past, and append them to the state in place.

        Shapes do not depend on lengths_B.

        Args:
            x_BTD: Normalized input of the new tokens `[B, T, D]`.
            rope: Rotary embedding of their positions, the last T of the sequences.
            state: From new_state.
            lengths_B: Length of each sequence including the new tokens, int32; at most max_seqlen of the
                state.

        Returns:
            The output `[B, T, D]`, before the residual connection.

        Raises:
            UnsupportedError: The module does not decode.
        """
        raise UnsupportedError(f"{type(self).__name__} does not support decoding")

    @abstractmethod
    def projection_flops_per_token(self) -> float:
        """Count the training FLOPs per token of products with weights: 6 per weight, 2 of them forward."""

    @abstractmethod
    def product_flops_per_token(self, seq_len: int) -> float:
        """Count the training FLOPs per token of the other products, in documents of seq_len tokens.

        Only matrix products count, two FLOPs per multiply-add, causal ones without their masked part;
        recomputation in the backward is not counted.
        """

    @abstractmethod
    def num_saved_elements_per_token(self) -> int:
        """Count the elements per token that the compiled forward saves for the backward.

        The block's input is not counted.
        """

    @abstractmethod
    def num_cache_elements(self, seq_len: int) -> int:
        """Count the elements of the decoding state of one sequence of seq_len tokens."""


class Rope:
    """Rotary position embedding (Su et al. 2021) of pairs (i, i + K/2), as in Qwen3.

    Args:
        positions: Position of every token in its document, `[1, T]` or `[B, T]`, integer.
        head_dim: Head width K, even.
        theta: Base of the frequencies theta^(-2i/K).
    """

    def __init__(self, positions: torch.Tensor, head_dim: int, theta: float) -> None:
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        angles = positions.to(torch.float32).unsqueeze(-1) * theta**-exponents
        self.cos, self.sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)

    def __call__(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        """Rotate heads `[B, T, H, K]` in at least fp32; the result has x's dtype."""
        left, right = x_BTHK.chunk(2, dim=-1)
        rotated = torch.cat((left * self.cos - right * self.sin, right * self.cos + left * self.sin), dim=-1)
        return rotated.to(x_BTHK.dtype)


def normalize_heads(x_BTHK: torch.Tensor, norm: nn.RMSNorm, rope: Rope | None) -> torch.Tensor:
    """Normalize each head and rotate it, `rope(norm(x))`; on a GPU by one kernel.

    Args:
        x_BTHK: Projected heads `[B, T, H, K]`, any strides.
        norm: Norm of the K elements of a head; one of another kind, or without an epsilon or a gain, keeps
            its own forward.
        rope: Rotary embedding of the T positions; None for none.

    Returns:
        `[B, T, H, K]`, x's dtype.
    """
    is_served = type(norm) is nn.RMSNorm and norm.eps is not None and norm.weight is not None
    if is_served and norm_rope.serves(x_BTHK):
        cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
        return norm_rope.norm_rope_forward(x_BTHK, norm.weight, cos, sin, norm.eps)
    x_BTHK = norm(x_BTHK)
    return x_BTHK if rope is None else rope(x_BTHK)


def mean_visible_keys(seq_len: int, window_size: int | None) -> float:
    """Return the mean number of keys that a query sees in a causal row of seq_len tokens."""
    window = seq_len if window_size is None else min(window_size, seq_len)
    return window * (2 * seq_len - window + 1) / (2 * seq_len)


class HeadProjections(Attention):
    """Query, key, value and output projections with QK-norm and RoPE, as in Qwen3.

    Args:
        size: Dimensions of the model.
        norm_eps: Epsilon of the RMSNorm of each head.

    Raises:
        UserError: num_heads is not a multiple of num_kv_heads, or head_dim is odd.
    """

    def __init__(self, size: ModelSize, norm_eps: float) -> None:
        super().__init__()
        if size.num_heads % size.num_kv_heads:
            raise UserError(
                f"model.custom_size.num_heads ({size.num_heads}) must be a multiple of num_kv_heads "
                f"({size.num_kv_heads})"
            )
        if size.head_dim % 2:
            raise UserError(f"model.custom_size.head_dim must be even for RoPE, got {size.head_dim}")
        self.size = size
        width_q, width_kv = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
        self.wq = nn.Linear(size.width, width_q, bias=False)
        self.wk = nn.Linear(size.width, width_kv, bias=False)
        self.wv = nn.Linear(size.width, width_kv, bias=False)
        self.wo = nn.Linear(width_q, size.width, bias=False)
        self.q_norm = nn.RMSNorm(size.head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(size.head_dim, eps=norm_eps)

    def split_heads(self, x_BTF: torch.Tensor) -> torch.Tensor:
        """Reshape `[B, T, H * K]` to `[B, T, H, K]`."""
        return x_BTF.unflatten(-1, (-1, self.size.head_dim))

    def project(self, x_BTD: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute queries `[B, T, H, K]`, keys and values `[B, T, G, K]`, with QK-norm and RoPE."""
        q_BTHK = normalize_heads(self.split_heads(self.wq(x_BTD)), self.q_norm, rope)
        k_BTGK = normalize_heads(self.split_heads(self.wk(x_BTD)), self.k_norm, rope)
        return q_BTHK, k_BTGK, self.split_heads(self.wv(x_BTD))

    def output(self, o_BTHK: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """Compute the module's output from that of its heads: the place of an output gate.

        Args:
            o_BTHK: Output of the heads `[B, T, H, K]`.
            x_BTD: The module's input at the same tokens.

        Returns:
            `[B, T, D]`; each token's depends on that token alone.
        """
        return self.wo(o_BTHK.flatten(2))

    def projection_flops_per_token(self) -> float:
        """See Attention.projection_flops_per_token."""
        return 6.0 * sum(p.numel() for p in self.parameters() if p.ndim == 2)

    def num_saved_elements_per_token(self) -> int:
        """See Attention: q, k, v as projected, q and k after RoPE, and the output."""
        size = self.size
        return (3 * size.num_heads + 3 * size.num_kv_heads) * size.head_dim

    def causal_flops_per_token(self, num_products: int, seq_len: int, window_size: int | None) -> float:
        """Count the FLOPs per token of num_products causal T x T x K products in every query head."""
        heads = self.size.num_heads * self.size.head_dim
        return 2.0 * num_products * heads * mean_visible_keys(seq_len, window_size)
