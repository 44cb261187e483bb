"""The Qwen3 decoder in plain PyTorch: embedding, blocks of attention and SwiGLU, head.

Letters: B batch, T tokens, D width, F MLP width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Self, TypeAlias, assert_never

import torch
from torch import nn
from torch.nn import functional as F

from errors import UserError
from models.attention.affine import AffineMesaNet, LinearAttention, ValueAverage
from models.attention.base import Attention, Rope, State
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
from models.loss import (
    autocast_disabled,
    linear_cross_entropy,
    linear_cross_entropy_with_z_loss,
    linear_token_losses,
)
from parallax.validation import check_cu_seqlens

Reduction: TypeAlias = Literal["sum", "none"]


def build_attention(config: ModelConfig, layer: int) -> Attention:
    """Build the attention module that the config names.

    Args:
        config: The [model] table.
        layer: Index of the block, from 0.

    Raises:
        UserError: Dimensions that do not fit each other.
    """
    size, eps = config.dimensions, config.norm_eps
    match config.attention:
        case SoftmaxConfig():
            return SoftmaxAttention(config.attention, size, eps)
        case ParallaxConfig() if layer < config.attention.num_plain_layers:
            plain = SoftmaxConfig(window_size=config.attention.window_size, impl=config.attention.impl)
            return SoftmaxAttention(plain, size, eps)
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
        case _:
            assert_never(config.attention)


class SwiGLU(nn.Module):
    """The MLP, down(silu(gate x) * up x).

    Args:
        width: Model width D.
        mlp_width: Inner width F.
    """

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, mlp_width, bias=False)
        self.up = nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Apply the MLP, `[B, T, D]` to `[B, T, D]`."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        config: The [model] table.
        layer: Index of the block, from 0.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size = config.dimensions
        self.attention_norm = nn.RMSNorm(size.width, eps=config.norm_eps)
        self.attention = build_attention(config, layer)
        self.mlp_norm = nn.RMSNorm(size.width, eps=config.norm_eps)
        self.mlp = SwiGLU(size.width, size.mlp_width)

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """Apply the block, `[B, T, D]` to `[B, T, D]`; arguments as Attention.forward."""
        return self._add_residuals(self.attention, x_BTD, rope, cu_seqlens, max_seqlen)

    def prefill(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """Apply the block to packed prompts and fill the state; arguments as Attention.prefill."""
        return self._add_residuals(self.attention.prefill, x_BTD, rope, cu_seqlens, max_seqlen, state)

    def extend(self, x_BTD: torch.Tensor, rope: Rope, state: State, lengths_B: torch.Tensor) -> torch.Tensor:
        """Apply the block to new tokens after those in the state; arguments as Attention.extend."""
        return self._add_residuals(self.attention.extend, x_BTD, rope, state, lengths_B)

    def _add_residuals(
        self, attend: Callable[..., torch.Tensor], x_BTD: torch.Tensor, *inputs: Any
    ) -> torch.Tensor:
        x_BTD = x_BTD + attend(self.attention_norm(x_BTD), *inputs)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Head(nn.Module):
    """The output projection, which owns how logits are computed.

    Args:
        weight_VD: The embedding's weight `[V, D]`, or one of its own.
    """

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits in at least fp32 by a product in the weight's dtype, autocast or not.

        On CUDA the fp32 accumulators of 16-bit products are returned as they are: rounded to bf16, logits are
        off by up to 0.03, which changes the order of almost equally likely tokens. Where a gradient is needed
        (that product has none), and on CPU, they are rounded to 16 bits first, as in the training loss.

        Args:
            x: Hidden states after the final norm, `[..., D]`.

        Returns:
            `[..., V]`, fp32, or fp64 where the weight is.
        """
        with autocast_disabled(x):
            x = x.to(self.weight.dtype)
            needs_grad = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
            if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and not needs_grad:
                logits = torch.mm(x.flatten(0, -2), self.weight.T, out_dtype=torch.float32)
                return logits.unflatten(0, x.shape[:-1])
            logits = F.linear(x, self.weight)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(
        self,
        x_BTD: torch.Tensor,
        labels_BT: torch.Tensor | None,
        reduction: Reduction = "sum",
        z_loss: float = 0.0,
    ) -> torch.Tensor:
        """Compute the logits `[B, T, V]` without labels, the loss with them; as Qwen3.forward."""
        if labels_BT is None:
            return self.logits(x_BTD)
        if reduction == "none":
            return linear_token_losses(x_BTD, self.weight, labels_BT)
        if z_loss:
            return torch.stack(linear_cross_entropy_with_z_loss(x_BTD, self.weight, labels_BT, z_loss))
        return linear_cross_entropy(x_BTD, self.weight, labels_BT)


def document_positions(
    num_tokens: int, cu_seqlens: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return the position of every token in its document, `[1, T]`, int64."""
    positions = torch.arange(num_tokens, device=device)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        positions = positions - cu_seqlens[document]
    return positions.unsqueeze(0)


class Qwen3(nn.Module):
    """A Qwen3 language model; `models.init.init_weights` draws its weights.

    Args:
        config: The [model] table.

    Raises:
        UserError: Dimensions that do not fit each other.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.dimensions
        self.tok_embeddings = nn.Embedding(config.vocab_size, size.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(size.num_layers))
        self.norm = nn.RMSNorm(size.width, eps=config.norm_eps)
        self.output = Head(nn.Parameter(torch.empty_like(self.tok_embeddings.weight)))
        self._tie_weights()

    def _tie_weights(self) -> None:
        if self.config.tie_embeddings:
            weight = self.tok_embeddings.weight
            assert isinstance(weight, nn.Parameter)
            self.output.weight = weight

    def materialize(self, device: torch.device | str) -> Self:
        """Allocate a model that was built on the meta device; its weights are uninitialized.

        Unlike to_empty alone, it keeps the weights of embedding and head tied.
        """
        self.to_empty(device=device)
        self._tie_weights()
        return self

    def unwrapped_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their names in the unwrapped model, a tied one once.

        Those are the names in a state dict, unlike those of named_parameters(): these contain the prefixes of
        activation checkpointing's wrappers.
        """
        names: dict[nn.Parameter, str] = {}
        for name, value in self.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                names.setdefault(value, name)
        return {name: parameter for parameter, name in names.items()}

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        labels_BT: torch.Tensor | None = None,
        reduction: Reduction = "sum",
        z_loss: float = 0.0,
    ) -> torch.Tensor:
        """Compute the logits, or the loss if labels are given.

        Args:
            tokens_BT: Token ids `[B, T]`, int64.
            cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1: attention and positions restart at
                each; None for B rows of one document each.
            max_seqlen: An upper bound on the length of a document; None for T.
            labels_BT: Token ids to predict `[B, T]`, int64; tokens.IGNORE_INDEX is skipped.
            reduction: "sum" for the loss of training; "none" for that of each token, without a gradient.
            z_loss: Coefficient of the z-loss (models/loss.py) that is added to the summed loss.

        Returns:
            Logits `[B, T, V]` as in Head.logits; or the summed loss in nats, a scalar, with z_loss a pair
            `[2]` of it and the z-loss in it, which has no gradient; or the loss of each token `[B, T]`, 0
            where it is skipped.

        Raises:
            UserError: T is 0.
            ValueError: B > 1 with cu_seqlens, or cu_seqlens is invalid (its values are checked on CPU only).
        """
        num_tokens = tokens_BT.shape[1]
        if num_tokens == 0:
            raise UserError("tokens_BT is empty (T = 0); pass at least one token")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, tokens_BT)
        positions = document_positions(num_tokens, cu_seqlens, tokens_BT.device)
        rope = Rope(positions, self.config.dimensions.head_dim, self.config.rope_theta)
        x_BTD = self.tok_embeddings(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rope, cu_seqlens, max_seqlen or num_tokens)
        return self.output(self.norm(x_BTD), labels_BT, reduction, z_loss)

    def attention_modules(self) -> Iterator[Attention]:
        """Iterate over the attention modules, from the first block to the last."""
        return (module for module in self.modules() if isinstance(module, Attention))

    def num_flops_per_token(self, seq_len: int) -> float:
        """Count the training FLOPs per token, forward and backward; recomputation is not counted.

        The head counts 6 V D, tied or not; the embedding's look-up counts nothing.

        Args:
            seq_len: Length of the documents, or of rows without document masks.
        """
        products = sum(module.product_flops_per_token(seq_len) for module in self.attention_modules())
        return self.weight_flops_per_token() + products

    def weight_flops_per_token(self) -> float:
        """Count the part of num_flops_per_token that no document's length changes: products with weights."""
        attention = sum(module.projection_flops_per_token() for module in self.attention_modules())
        mlp = sum(p.numel() for m in self.modules() if isinstance(m, SwiGLU) for p in m.parameters())
        return attention + 6.0 * (mlp + self.output.weight.numel())

    def document_flops(self, max_seqlen: int) -> torch.Tensor:
        """Count the training FLOPs of documents of 0, 1, ..., max_seqlen tokens, fp64 `[max_seqlen + 1]`."""
        modules, weights = list(self.attention_modules()), self.weight_flops_per_token()
        flops = [0.0]
        for length in range(1, max_seqlen + 1):
            products = sum(module.product_flops_per_token(length) for module in modules)
            flops.append(length * (weights + products))
        return torch.tensor(flops, dtype=torch.float64)

    def num_saved_elements_per_token(self) -> list[int]:
        """Count the elements per token that each compiled block saves for the backward.

        Two residuals, both also normalized, what the attention saves, and gate, up and their product.
        """
        size = self.config.dimensions
        shared = 4 * size.width + 3 * size.mlp_width
        return [shared + module.num_saved_elements_per_token() for module in self.attention_modules()]

    def num_cache_elements(self, seq_len: int) -> int:
        """Count the elements of one sequence's decoding cache at seq_len tokens: KV cache or states."""
        return sum(module.num_cache_elements(seq_len) for module in self.attention_modules())

    def num_parameters(self) -> dict[str, int]:
        """Count the parameters by part: embedding (and head), attention (and its w_r), mlp, norms, total."""
        counts = dict.fromkeys(("embedding", "attention", "w_r", "mlp", "norms", "total"), 0)
        for name, parameter in self.unwrapped_parameters().items():
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
