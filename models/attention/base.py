"""The contract of an attention, and the projections that the softmax family shares.

Letters: B batch, T tokens, D width, H query heads, G key/value heads, K head width.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from models.sizes import ModelSize

State = dict[str, torch.Tensor]
"""What an attention remembers of each of B sequences, by name: tensors `[B, ...]`, updated in place."""


class Attention(nn.Module, ABC):
    """Mixes tokens. Its parameters are its own; its cost is what it says.

    Attributes:
        has_graph_breaks: torch.compile cannot hold all of forward in one graph.
        extends_in_graph: A CUDA graph can hold extend.
    """

    has_graph_breaks: bool = False
    extends_in_graph: bool = True

    @abstractmethod
    def forward(
        self, x_BTD: torch.Tensor, rope: "Rope", cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """Mix every token with the past of its document.

        Args:
            x_BTD: Normalised input `[B, T, D]`.
            rope: Rotary embedding of the T positions.
            cu_seqlens: Document bounds `[N + 1]`, int32, with B = 1; None for B rows of one document each.
            max_seqlen: An upper bound on the length of a document.

        Returns:
            What is added to the residual stream, `[B, T, D]`.
        """

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor | None:
        """Where a parameter of this module starts, if not where models.init has it.

        Args:
            name: The parameter's name in this module.
            shape: Its whole shape.
            generator: Of this parameter alone, from the run's seed and the parameter's name in the model.

        Returns:
            The whole value, fp32, on the CPU. None to start as any other, whatever the constructor has put
            there: matrices normal, gains of norms one; any other parameter needs a value.
        """
        return None

    def new_state(self, batch: int, max_seqlen: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """What decoding needs of the past, for sequences that have none yet.

        Args:
            batch: Number of sequences B.
            max_seqlen: The longest that a sequence may become.
            device: Where it lies.
            dtype: The weights' dtype; sums that run over the past may be kept in fp32.

        Returns:
            Tensors `[B, ...]`, num_cache_elements(max_seqlen) elements a sequence.
        """
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def prefill(
        self, x_BTD: torch.Tensor, rope: "Rope", cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """Forward over packed documents (B = 1), which also writes document n into row n of an empty state.

        Args and returns as forward; no document is empty.
        """
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def extend(
        self, x_BTD: torch.Tensor, rope: "Rope", state: State, lengths_B: torch.Tensor
    ) -> torch.Tensor:
        """Mix T new tokens of each sequence with its past, and add them to the state.

        Shapes do not depend on lengths_B, and the state is updated in place, so that a CUDA graph holds it
        where extends_in_graph says so.

        Args:
            x_BTD: Normalised input of the new tokens `[B, T, D]`.
            rope: Rotary embedding of their positions, the last T of the sequences.
            state: From new_state; lengths_B must not exceed its max_seqlen.
            lengths_B: Tokens of each sequence, the new ones included, int32.

        Returns:
            What is added to the residual stream, `[B, T, D]`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    @abstractmethod
    def num_flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of a training step per token, forward and backward.

        Counts matrix products only (a multiplication and an addition each), causal ones as causal, for rows
        of one document of seq_len tokens; what a backward recomputes is not counted.
        """

    @abstractmethod
    def num_saved_elements_per_token(self) -> int:
        """Elements that the compiled forward keeps for the backward, per token.

        The block's input is not counted.
        """

    @abstractmethod
    def num_cache_elements(self, seq_len: int) -> int:
        """Elements that decoding holds of one sequence after seq_len tokens: keys and values, or a state."""


class Rope:
    """Rotary position embedding (Su et al. 2021), halves rotated against each other as in Qwen3."""

    def __init__(self, positions: torch.Tensor, head_dim: int, theta: float) -> None:
        """Tabulate the angles.

        Args:
            positions: Position of every token in its document, `[1, T]` or `[B, T]`, integer.
            head_dim: Head width K, even.
            theta: Base of the frequencies theta^(-2i/K).
        """
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        angles = positions.to(torch.float32).unsqueeze(-1) * theta**-exponents
        self.cos, self.sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)

    def __call__(self, x_BTHK: torch.Tensor) -> torch.Tensor:
        """Rotate the heads `[B, T, H, K]`; the arithmetic is at least fp32, the result has x's dtype."""
        left, right = x_BTHK.chunk(2, dim=-1)
        rotated = torch.cat((left * self.cos - right * self.sin, right * self.cos + left * self.sin), dim=-1)
        return rotated.to(x_BTHK.dtype)


def mean_visible_keys(seq_len: int, window_size: int | None) -> float:
    """Mean number of keys that a query of a causal row of seq_len tokens sees."""
    window = seq_len if window_size is None else min(window_size, seq_len)
    return window * (2 * seq_len - window + 1) / (2 * seq_len)


class HeadProjections(Attention):
    """Queries, keys, values and the output projection, with QK-norm and RoPE, as in Qwen3."""

    def __init__(self, size: ModelSize, norm_eps: float) -> None:
        """Build the projections.

        Args:
            size: Dimensions of the model.
            norm_eps: Epsilon of the RMSNorm of each head.

        Raises:
            ValueError: The heads do not divide among the key/value heads, or head_dim is odd.
        """
        super().__init__()
        if size.num_heads % size.num_kv_heads:
            raise ValueError(
                f"num_heads ({size.num_heads}) must be a multiple of num_kv_heads ({size.num_kv_heads})"
            )
        if size.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {size.head_dim}")
        self.size = size
        width_q, width_kv = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
        self.wq = nn.Linear(size.width, width_q, bias=False)
        self.wk = nn.Linear(size.width, width_kv, bias=False)
        self.wv = nn.Linear(size.width, width_kv, bias=False)
        self.wo = nn.Linear(width_q, size.width, bias=False)
        self.q_norm = nn.RMSNorm(size.head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(size.head_dim, eps=norm_eps)

    def split_heads(self, x_BTF: torch.Tensor) -> torch.Tensor:
        """View `[B, T, H * K]` as `[B, T, H, K]`."""
        return x_BTF.unflatten(-1, (-1, self.size.head_dim))

    def project(self, x_BTD: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, T, H, K]`, keys and values `[B, T, G, K]`, normalised and rotated."""
        q_BTHK = rope(self.q_norm(self.split_heads(self.wq(x_BTD))))
        k_BTGK = rope(self.k_norm(self.split_heads(self.wk(x_BTD))))
        return q_BTHK, k_BTGK, self.split_heads(self.wv(x_BTD))

    def projection_flops_per_token(self) -> float:
        """Training FLOPs per token of every matrix of this module: 2 forward and 4 backward a weight."""
        return 6.0 * sum(p.numel() for p in self.parameters() if p.ndim == 2)

    def num_saved_elements_per_token(self) -> int:
        """See Attention: q, k, v as projected, q and k as rotated, and the output."""
        size = self.size
        return (3 * size.num_heads + 3 * size.num_kv_heads) * size.head_dim

    def product_flops_per_token(self, num_products: int, seq_len: int, window_size: int | None) -> float:
        """FLOPs per token of num_products causal products of T x T x K in every query head."""
        heads = self.size.num_heads * self.size.head_dim
        return 2.0 * num_products * heads * mean_visible_keys(seq_len, window_size)
