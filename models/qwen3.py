"""The Qwen3 decoder in plain PyTorch: embedding, blocks of attention and SwiGLU, head.

Letters: B batch, T tokens, D width, F MLP width, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.attention.affine import AffineMesaNet, LinearAttention, ValueAverage
from models.attention.base import Attention, Rope
from models.attention.delta_net import GatedDeltaNet, KimiDeltaAttention
from models.attention.local_linear import LocalLinearAttention
from models.attention.mamba2 import Mamba2
from models.attention.mesa_net import MesaNet
from models.attention.parallax import ParallaxAttention
from models.attention.softmax import SoftmaxAttention
from models.config import (
    AffineLinearConfig,
    AffineMesaNetConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    LinearConfig,
    LocalLinearConfig,
    Mamba2Config,
    MesaNetConfig,
    ModelConfig,
    ParallaxConfig,
    SoftmaxConfig,
    ValueAverageConfig,
)
from models.loss import linear_cross_entropy
from parallax.validation import check_cu_seqlens


def build_attention(config: ModelConfig, layer: int) -> Attention:
    """The attention that the config names, for the block with that index."""
    size, eps = config.dimensions, config.norm_eps
    match config.attention:
        case SoftmaxConfig():
            return SoftmaxAttention(config.attention, size, eps)
        case ParallaxConfig() if layer < config.attention.num_plain_layers:
            return SoftmaxAttention(SoftmaxConfig(window_size=config.attention.window_size), size, eps)
        case ParallaxConfig():
            return ParallaxAttention(config.attention, size, eps)
        case LocalLinearConfig():
            return LocalLinearAttention(config.attention, size, eps)
        case ValueAverageConfig():
            return ValueAverage(size)
        case LinearConfig() | AffineLinearConfig():
            return LinearAttention(config.attention, size, eps)
        case AffineMesaNetConfig():
            return AffineMesaNet(config.attention, size, eps)
        case GatedDeltaNetConfig():
            return GatedDeltaNet(config.attention, size, eps)
        case KimiDeltaConfig():
            return KimiDeltaAttention(size, eps)
        case MesaNetConfig():
            return MesaNet(config.attention, size, eps)
        case Mamba2Config():
            return Mamba2(config.attention, size, eps)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, mlp_width: int) -> None:
        """Build the three matrices.

        Args:
            width: Model width D.
            mlp_width: Inner width F.
        """
        super().__init__()
        self.gate = nn.Linear(width, mlp_width, bias=False)
        self.up = nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """A pre-norm block: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Build the block.

        Args:
            config: The [model] table.
            layer: Its index, from 0.
        """
        super().__init__()
        size = config.dimensions
        self.attention_norm = nn.RMSNorm(size.width, eps=config.norm_eps)
        self.attention = build_attention(config, layer)
        self.mlp_norm = nn.RMSNorm(size.width, eps=config.norm_eps)
        self.mlp = SwiGLU(size.width, size.mlp_width)

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """One layer, `[B, T, D]` to `[B, T, D]`; arguments as Attention.forward."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, cu_seqlens, max_seqlen)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Head(nn.Module):
    """The output projection."""

    def __init__(self, weight_VD: nn.Parameter) -> None:
        """Take a weight.

        Args:
            weight_VD: The embedding's weight `[V, D]`, or one of its own.
        """
        super().__init__()
        self.weight = weight_VD

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V]` in fp32 of `[N, D]`: what chooses between tokens should not round their scores."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
                return torch.mm(x, self.weight.T, out_dtype=torch.float32)
            return F.linear(x, self.weight).float()

    def forward(self, x_BTD: torch.Tensor, labels_BT: torch.Tensor | None) -> torch.Tensor:
        """Logits `[B, T, V]` without labels, the summed loss in nats with them."""
        if labels_BT is None:
            return F.linear(x_BTD, self.weight)
        return linear_cross_entropy(x_BTD, self.weight, labels_BT)


def document_positions(
    num_tokens: int, cu_seqlens: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Position of every token in its document, `[1, T]`, int64."""
    positions = torch.arange(num_tokens, device=device)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        positions = positions - cu_seqlens[document]
    return positions.unsqueeze(0)


class Qwen3(nn.Module):
    """A Qwen3 language model."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the model; its weights are set by `models.init.init_weights`.

        Args:
            config: The [model] table.

        Raises:
            ValueError: Dimensions that do not fit each other.
        """
        super().__init__()
        self.config = config
        size = config.dimensions
        self.tok_embeddings = nn.Embedding(config.vocab_size, size.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(size.num_layers))
        self.norm = nn.RMSNorm(size.width, eps=config.norm_eps)
        weight = self.tok_embeddings.weight
        assert isinstance(weight, nn.Parameter)
        self.output = Head(weight if config.tie_embeddings else nn.Parameter(torch.empty_like(weight)))

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        labels_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, or the loss where labels are given.

        Args:
            tokens_BT: Ids `[B, T]`, int64.
            cu_seqlens: Document bounds `[N + 1]`, int32, with B = 1: tokens see their own document only and
                positions start anew in each; None for B rows of one document each.
            max_seqlen: An upper bound on the length of a document; None for T.
            labels_BT: Ids to predict `[B, T]`, int64, models.loss.IGNORE_INDEX where nothing is.

        Returns:
            Logits `[B, T, V]` in the weights' dtype, or the summed loss in nats, a scalar.

        Raises:
            ValueError: T is 0, cu_seqlens comes with B > 1, or it is wrong in itself (values on CPU alone).
        """
        num_tokens = tokens_BT.shape[1]
        if num_tokens == 0:
            raise ValueError("tokens hold no position (T = 0); give at least one token")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, tokens_BT)
        positions = document_positions(num_tokens, cu_seqlens, tokens_BT.device)
        rope = Rope(positions, self.config.dimensions.head_dim, self.config.rope_theta)
        x_BTD = self.tok_embeddings(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rope, cu_seqlens, max_seqlen or num_tokens)
        return self.output(self.norm(x_BTD), labels_BT)

    def num_flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs per token, forward and backward, of every matrix product; recomputation not counted.

        Args:
            seq_len: Length of a row; attention is counted as causal over whole rows.

        Returns:
            The head counts as the product it is (6 V D), tied or not, the embedding's look-up as nothing.
        """
        attention = sum(m.num_flops_per_token(seq_len) for m in self.modules() if isinstance(m, Attention))
        mlp = sum(p.numel() for m in self.modules() if isinstance(m, SwiGLU) for p in m.parameters())
        return attention + 6.0 * (mlp + self.output.weight.numel())

    def num_saved_elements_per_token(self) -> list[int]:
        """Elements that each compiled block keeps for the backward, per token.

        Both residuals, plain and normalised, what the attention keeps, and gate, up and their product.
        """
        size = self.config.dimensions
        shared = 4 * size.width + 3 * size.mlp_width
        return [
            shared + module.num_saved_elements_per_token()
            for module in self.modules()
            if isinstance(module, Attention)
        ]

    def num_cache_elements(self, seq_len: int) -> int:
        """Elements that decoding holds for one sequence of seq_len tokens: keys and values, or states."""
        return sum(m.num_cache_elements(seq_len) for m in self.modules() if isinstance(m, Attention))

    def num_parameters(self) -> dict[str, int]:
        """Parameters by part: embedding (and the head), attention (w_r in it), mlp, norms, total."""
        counts = dict.fromkeys(("embedding", "attention", "w_r", "mlp", "norms", "total"), 0)
        for name, parameter in self.named_parameters():
            if name in ("tok_embeddings.weight", "output.weight"):
                part = "embedding"
            elif name.endswith("norm.weight"):
                part = "norms"
            else:
                part = "attention" if ".attention." in name else "mlp"
            counts[part] += parameter.numel()
            counts["w_r"] += parameter.numel() if ".attention.wr" in name else 0
            counts["total"] += parameter.numel()
        return counts
