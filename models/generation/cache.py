"""The decoding cache of a batch of sequences, and the two passes that fill it.

prefill computes packed prompts into an empty cache; extend appends new tokens to every sequence.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from disk import format_bytes
from errors import UserError
from models.attention.base import Rope, State
from models.qwen3 import Block, Qwen3, document_positions

ExtendBlock = Callable[[Block, torch.Tensor, Rope, State, torch.Tensor], torch.Tensor]
"""Block.extend, or that compiled."""


@dataclass(frozen=True)
class Cache:
    """The decoding states of B sequences.

    Attributes:
        states: Decoding state of each layer's attention.
        lengths_B: Tokens in the cache of each sequence, `[B]` int32.
        max_seqlen: Maximum length of a sequence.
    """

    states: list[State]
    lengths_B: torch.Tensor
    max_seqlen: int

    @classmethod
    def new(cls, model: Qwen3, batch: int, max_seqlen: int) -> "Cache":
        """Allocate an empty cache on the model's device, in the dtype of its weights.

        Args:
            model: The model that will use it.
            batch: Number of sequences B.
            max_seqlen: Maximum length of a sequence.

        Raises:
            UserError: The device has less memory than the cache takes.
        """
        weight = model.tok_embeddings.weight
        needed = batch * model.num_cache_elements(max_seqlen) * weight.itemsize
        if needed > (memory := _memory_bytes(weight.device)):
            raise UserError(
                f"the decoding cache of {batch} sequences of up to {max_seqlen:,} tokens takes "
                f"{format_bytes(needed)}, but {weight.device} has {format_bytes(memory)}: give a smaller "
                "max_new_tokens"
            )
        states = [
            attention.new_state(batch, max_seqlen, device=weight.device, dtype=weight.dtype)
            for attention in model.attention_modules()
        ]
        return cls(states, torch.zeros(batch, dtype=torch.int32, device=weight.device), max_seqlen)

    def select(self, rows: torch.Tensor) -> "Cache":
        """Copy the sequences at the given indices, which may repeat.

        Args:
            rows: Indices `[B']`, int64, on the cache's device.
        """
        states = [{name: x[rows] for name, x in state.items()} for state in self.states]
        return Cache(states, self.lengths_B[rows], self.max_seqlen)

    def reset(self) -> None:
        """Empty the cache in place."""
        for state in self.states:
            for x in state.values():
                x.zero_()
        self.lengths_B.zero_()


def _memory_bytes(device: torch.device) -> int:
    """Return the size of a device's memory in bytes, all that is in use included."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _run_blocks(
    model: Qwen3,
    tokens_BT: torch.Tensor,
    cache: Cache,
    run_block: Callable[[Block, torch.Tensor, State], torch.Tensor],
) -> torch.Tensor:
    # without autocast: in the dtype of the weights and of the cache
    with torch.autocast(tokens_BT.device.type, enabled=False):
        x_BTD = model.tok_embeddings(tokens_BT)
        for block, state in zip(model.layers, cache.states, strict=True):
            assert isinstance(block, Block)
            x_BTD = run_block(block, x_BTD, state)
        return model.norm(x_BTD)


@torch.no_grad()
def prefill(model: Qwen3, tokens_1T: torch.Tensor, cu_seqlens: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Compute packed prompts, and store them in an empty cache.

    Args:
        model: The model.
        tokens_1T: Token ids of all prompts, concatenated, `[1, T]`, int64.
        cu_seqlens: Boundaries of the prompts `[B + 1]`, int32, on the model's device.
        cache: Empty, of B sequences.

    Returns:
        Hidden states after the final norm, `[1, T, D]`, the input of `model.output`.

    Raises:
        UserError: A prompt is empty or longer than the cache.
    """
    lengths = cu_seqlens.diff()
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1:
        raise UserError("a prompt is empty; start it with the end-of-document token")
    if longest > cache.max_seqlen:
        raise UserError(
            f"a prompt has {longest} tokens, the cache holds {cache.max_seqlen}; allocate a longer cache"
        )
    rope = _rope(model, document_positions(tokens_1T.shape[1], cu_seqlens, tokens_1T.device))

    def run_block(block: Block, x_1TD: torch.Tensor, state: State) -> torch.Tensor:
        return block.prefill(x_1TD, rope, cu_seqlens, longest, state)

    x_1TD = _run_blocks(model, tokens_1T, cache, run_block)
    cache.lengths_B.copy_(lengths)
    return x_1TD


@torch.no_grad()
def extend(
    model: Qwen3, tokens_BT: torch.Tensor, cache: Cache, extend_block: ExtendBlock = Block.extend
) -> torch.Tensor:
    """Append T tokens to each sequence; does not synchronize with the device for T up to 64.

    Shorter rows may be padded on the right if the cache is not used afterwards.

    Args:
        model: The model.
        tokens_BT: Token ids `[B, T]`, int64.
        cache: Of B sequences, with room for T more tokens in each (not checked).
        extend_block: Block.extend, or that compiled.

    Returns:
        Hidden states after the final norm, `[B, T, D]`, the input of `model.output`.
    """
    num_tokens = tokens_BT.shape[1]
    cache.lengths_B.add_(num_tokens)
    last = torch.arange(-num_tokens, 0, device=tokens_BT.device)
    rope = _rope(model, cache.lengths_B[:, None] + last)

    def run_block(block: Block, x_BTD: torch.Tensor, state: State) -> torch.Tensor:
        return extend_block(block, x_BTD, rope, state, cache.lengths_B)

    return _run_blocks(model, tokens_BT, cache, run_block)


def _rope(model: Qwen3, positions: torch.Tensor) -> Rope:
    return Rope(positions, model.config.dimensions.head_dim, model.config.rope_theta)
