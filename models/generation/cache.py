"""What a model remembers of the sequences that it continues, and the two passes that use it.

prefill reads whole prompts, packed, into an empty cache; extend adds a few tokens to each sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.attention.base import Attention, Rope, State
from models.qwen3 import Block, Qwen3, document_positions

ExtendBlock = Callable[[Block, torch.Tensor, Rope, State, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Cache:
    """The past of B sequences.

    Attributes:
        states: What each layer's attention remembers.
        lengths_B: Tokens of each sequence so far, `[B]` int32.
        max_seqlen: The longest that a sequence may become.
    """

    states: list[State]
    lengths_B: torch.Tensor
    max_seqlen: int

    @classmethod
    def new(cls, model: Qwen3, batch: int, max_seqlen: int) -> "Cache":
        """An empty cache on the model's device.

        Args:
            model: The model that will use it.
            batch: Number of sequences B.
            max_seqlen: The longest that a sequence may become.
        """
        weight = model.tok_embeddings.weight
        states = [
            attention.new_state(batch, max_seqlen, device=weight.device, dtype=weight.dtype)
            for attention in _attentions(model)
        ]
        return cls(states, torch.zeros(batch, dtype=torch.int32, device=weight.device), max_seqlen)

    def select(self, rows: torch.Tensor) -> "Cache":
        """A copy of some sequences, each as often as it is named.

        Args:
            rows: Indices `[B']`, int64, on the cache's device.
        """
        states = [{name: x[rows] for name, x in state.items()} for state in self.states]
        return Cache(states, self.lengths_B[rows], self.max_seqlen)

    def reset(self) -> None:
        """Forget everything, in place."""
        for state in self.states:
            for x in state.values():
                x.zero_()
        self.lengths_B.zero_()


def _attentions(model: Qwen3) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def extend_block(
    block: Block, x_BTD: torch.Tensor, rope: Rope, state: State, lengths_B: torch.Tensor
) -> torch.Tensor:
    """One layer over new tokens, `[B, T, D]` to `[B, T, D]`; arguments as Attention.extend."""
    x_BTD = x_BTD + block.attention.extend(block.attention_norm(x_BTD), rope, state, lengths_B)
    return x_BTD + block.mlp(block.mlp_norm(x_BTD))


def _through(
    model: Qwen3,
    tokens_BT: torch.Tensor,
    cache: Cache,
    layer: Callable[[Block, torch.Tensor, State], torch.Tensor],
) -> torch.Tensor:
    # in the dtype of the weights, which the cache has too
    with torch.autocast(tokens_BT.device.type, enabled=False):
        x_BTD = model.tok_embeddings(tokens_BT)
        for block, state in zip(model.layers, cache.states, strict=True):
            assert isinstance(block, Block)
            x_BTD = layer(block, x_BTD, state)
        return model.norm(x_BTD)


@torch.no_grad()
def prefill(model: Qwen3, tokens_1T: torch.Tensor, cu_seqlens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read prompts into an empty cache.

    Args:
        model: The model.
        tokens_1T: Ids of all prompts one after the other `[1, T]`, int64.
        cu_seqlens: Their bounds `[B + 1]`, int32, on the model's device.
        cache: Empty, of B sequences.

    Returns:
        What the head takes, `[1, T, D]`: `model.output(x, None)` gives the logits.

    Raises:
        ValueError: A prompt is empty or longer than the cache.
    """
    lengths = cu_seqlens.diff()
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1:
        raise ValueError(
            "a prompt is empty; give each at least one token, the end-of-document token for none"
        )
    if longest > cache.max_seqlen:
        raise ValueError(
            f"a prompt has {longest} tokens, the cache holds {cache.max_seqlen}; allocate a longer cache"
        )
    rope = _rope(model, document_positions(tokens_1T.shape[1], cu_seqlens, tokens_1T.device))

    def layer(block: Block, x_1TD: torch.Tensor, state: State) -> torch.Tensor:
        normalised = block.attention_norm(x_1TD)
        x_1TD = x_1TD + block.attention.prefill(normalised, rope, cu_seqlens, longest, state)
        return x_1TD + block.mlp(block.mlp_norm(x_1TD))

    x_1TD = _through(model, tokens_1T, cache, layer)
    cache.lengths_B.copy_(lengths)
    return x_1TD


@torch.no_grad()
def extend(
    model: Qwen3, tokens_BT: torch.Tensor, cache: Cache, layer: ExtendBlock = extend_block
) -> torch.Tensor:
    """Add T tokens to each sequence; nothing waits for the device where T is at most 64.

    Rows of different lengths may be padded on the right where the cache is not used afterwards.

    Args:
        model: The model.
        tokens_BT: Ids `[B, T]`, int64.
        cache: Of B sequences, with room for T more tokens in each, which is not checked.
        layer: extend_block, or that compiled.

    Returns:
        What the head takes, `[B, T, D]`: `model.output(x, None)` gives the logits.
    """
    num_tokens = tokens_BT.shape[1]
    cache.lengths_B.add_(num_tokens)
    last = torch.arange(-num_tokens, 0, device=tokens_BT.device)
    rope = _rope(model, cache.lengths_B[:, None] + last)

    def layer_with_rope(block: Block, x_BTD: torch.Tensor, state: State) -> torch.Tensor:
        return layer(block, x_BTD, rope, state, cache.lengths_B)

    return _through(model, tokens_BT, cache, layer_with_rope)


def _rope(model: Qwen3, positions: torch.Tensor) -> Rope:
    return Rope(positions, model.config.dimensions.head_dim, model.config.rope_theta)
