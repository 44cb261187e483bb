"""The models of MAD: two blocks of attention and SwiGLU of width 128, as a language model or an autoencoder.

Letters: B batch, T tokens, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from errors import UserError
from eval.mad.changes import format_changes, read_changes
from eval.mad.settings import Setting
from models.attention.base import Attention, Rope
from models.config import (
    AttentionConfig,
    LocalLinearConfig,
    Mamba2Config,
    ModelConfig,
    ParallaxConfig,
    SoftmaxConfig,
)
from models.qwen3 import Block, document_positions
from models.sizes import ModelSize

WIDTH = 128

_INIT_STD = 0.02
_ROPE_THETA = 10_000.0
_NORM_EPS = 1e-5
_FULL = ModelSize(width=WIDTH, num_layers=2, num_heads=16, num_kv_heads=16, head_dim=8, mlp_width=352)
# a state of 4096 elements in a layer, as MAD asks of every mixer whose state does not grow
_RECURRENT = replace(_FULL, num_heads=4, num_kv_heads=4, head_dim=32)
_GATED_DELTANET = replace(_FULL, num_heads=2, num_kv_heads=2, head_dim=32)
_MAMBA2 = replace(_FULL, num_heads=4, num_kv_heads=4, head_dim=64)
_MAMBA2_STATE_SIZE = 16


def attention_kinds() -> dict[str, AttentionConfig]:
    """Return the attentions that MAD can test, by their kind."""
    configs = {config().kind: config() for config in get_args(AttentionConfig)}
    return configs | {"mamba2": Mamba2Config(state_size=_MAMBA2_STATE_SIZE)}


@dataclass(frozen=True, kw_only=True)
class MadConfig(ModelConfig):
    """A model of MAD.

    Attributes:
        has_rope: Whether RoPE rotates heads; without it all positions are 0.
    """

    has_rope: bool = True


def model_config(kind: str, vocab_size: int, changes: str = "") -> MadConfig:
    """Return the dimensions and the attention of a model of MAD.

    Attentions over all keys have MAD's 16 heads of width 8. Attentions with a fixed state have heads such
    that a layer's state has MAD's 4096 elements: two of 32 x 64 for Gated DeltaNet, four of 16 x 64 for
    Mamba-2, four of 32 x 32 for others; a second state, such as MesaNet's of the keys, is not counted.

    Args:
        kind: The attention, as attention.kind of a config.
        vocab_size: Vocabulary V.
        changes: What is different, from canonical_changes.

    Raises:
        UserError: There is no such attention, or it does not have such changes.
    """
    kinds = attention_kinds()
    if kind not in kinds:
        raise UserError(f"--attention is {kind!r}, want some of {','.join(kinds)}")
    attention = kinds[kind]
    match attention:
        case SoftmaxConfig() | ParallaxConfig() | LocalLinearConfig():
            size = _FULL
        case Mamba2Config():
            size = _MAMBA2
        case _:
            size = _GATED_DELTANET if kind == "gated-deltanet" else _RECURRENT
    changed = read_changes(attention, size.head_dim, changes.split())
    head_dim, has_rope = changed.pop("head_dim", None), changed.pop("rope", True)
    if head_dim is not None:
        num_heads = WIDTH // head_dim
        size = replace(size, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim)
    return MadConfig(
        size="custom",
        custom_size=size,
        vocab_size=vocab_size,
        tie_embeddings=False,
        attention=replace(attention, **changed),
        rope_theta=_ROPE_THETA,
        norm_eps=_NORM_EPS,
        has_rope=has_rope,
    )


def canonical_changes(kind: str, words: Sequence[str]) -> str:
    """Return the one name of changes of an attention: sorted by key, without those to the value there is.

    Args:
        kind: The attention, as attention.kind of a config.
        words: Such as "head_dim=32": keys of the attention's own table, head_dim where it is over all keys
            (there are as many heads as fill the width) and rope where it has RoPE.

    Returns:
        Words with spaces between them, which model_config reads.

    Raises:
        UserError: There is no such attention, key or value.
    """
    config = model_config(kind, 1)
    changes = format_changes(read_changes(config.attention, config.dimensions.head_dim, words))
    model_config(kind, 1, changes)
    return changes


class _Encoder(nn.Module):
    """Embedding and blocks."""

    def __init__(self, config: MadConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, WIDTH)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.dimensions.num_layers))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Compute the states of tokens `[B, T]`, `[B, T, D]`."""
        num_tokens = tokens_BT.shape[1]
        positions = document_positions(num_tokens, None, tokens_BT.device)
        if not self.config.has_rope:
            positions = torch.zeros_like(positions)
        rope = Rope(positions, self.config.dimensions.head_dim, self.config.rope_theta)
        x_BTD = self.embedding(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rope, None, num_tokens)
        return x_BTD


class LanguageModel(nn.Module):
    """Predicts a token at every position from those up to it, by an untied head with a bias.

    Args:
        config: From model_config.
    """

    def __init__(self, config: MadConfig) -> None:
        super().__init__()
        self.encoder = _Encoder(config)
        self.norm = nn.RMSNorm(WIDTH, eps=config.norm_eps)
        self.head = nn.Linear(WIDTH, config.vocab_size)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Compute logits `[B, T, V]` of tokens `[B, T]`."""
        return self.head(self.norm(self.encoder(tokens_BT)))


class AutoEncoder(nn.Module):
    """Predicts all tokens from the state of the last one, to which the position of each is added.

    Args:
        config: From model_config.
    """

    def __init__(self, config: MadConfig) -> None:
        super().__init__()
        eps = config.norm_eps
        self.encoder = _Encoder(config)
        self.decoder = nn.Sequential(
            nn.RMSNorm(WIDTH, eps=eps),
            nn.Linear(WIDTH, WIDTH),
            nn.GELU(),
            nn.RMSNorm(WIDTH, eps=eps),
            nn.Linear(WIDTH, WIDTH),
            nn.GELU(),
        )
        self.norm = nn.RMSNorm(WIDTH, eps=eps)
        self.head = nn.Linear(WIDTH, config.vocab_size)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Compute logits `[B, T, V]` of tokens `[B, T]`."""
        last_BD = self.encoder(tokens_BT)[:, -1]
        x_BTD = last_BD.unsqueeze(1) + sinusoids(tokens_BT.shape[1], tokens_BT.device)
        return self.head(self.norm(self.decoder(x_BTD)))


def sinusoids(num_positions: int, device: torch.device) -> Tensor:
    """Return fixed position vectors `[T, D]`, fp32: sines, then cosines, of frequencies 1 to 1e-4."""
    half = WIDTH // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / (half - 1)))
    angles = torch.arange(num_positions, device=device).unsqueeze(1) * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def is_autoencoder(setting: Setting) -> bool:
    """Return whether a setting has an autoencoder as its model."""
    return setting.task == "compression"


def build_model(kind: str, setting: Setting, seed: int, changes: str = "") -> LanguageModel | AutoEncoder:
    """Build the model of a setting on the CPU: an autoencoder for compression, else a language model.

    As in MAD, embeddings are normal with a standard deviation of 0.02, and so are the matrices of the
    autoencoder; those of the language model are uniform within 1 / sqrt(columns), torch's default. Biases
    are 0. What an attention gives an initial value of its own (Attention.initial_value) keeps it.

    Args:
        kind: The attention, as attention.kind of a config.
        setting: The sizes.
        seed: Seed of the weights.
        changes: What is different, from canonical_changes.

    Raises:
        UserError: There is no such attention, or it does not have such changes.
    """
    config = model_config(kind, setting.vocab_size, changes)
    model = AutoEncoder(config) if is_autoencoder(setting) else LanguageModel(config)
    _init_weights(model, torch.Generator().manual_seed(seed))
    return model


def compute_logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Compute logits `[B, T, V]`, fp32, of tokens `[B, T]`: in bf16 under autocast on CUDA, as MAD does."""
    # a region of its own for each forward: autocast keeps its casts of the weights until its region ends
    with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=tokens_BT.is_cuda):
        logits_BTV = model(tokens_BT)
    return logits_BTV.float()


@torch.no_grad()
def _init_weights(model: LanguageModel | AutoEncoder, generator: torch.Generator) -> None:
    is_normal = isinstance(model, AutoEncoder)
    for module in model.modules():
        match module:
            case nn.Embedding():
                module.weight.normal_(0.0, _INIT_STD, generator=generator)
            case nn.RMSNorm():
                module.weight.fill_(1.0)
            case nn.Linear() if is_normal:
                module.weight.normal_(0.0, _INIT_STD, generator=generator)
            case nn.Linear():
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
            case _:
                pass
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        for name, parameter in attention.named_parameters():
            value = attention.initial_value(name, parameter.shape, generator)
            if value is not None:
                parameter.copy_(value)
