"""Estimate the peak GPU memory of a training step from the shapes.

The peak is reached in the loss: fp32 master weights, optimizer state, the gathered embedding, the activations
that every block saves for the backward, one chunk of logits, and with gradient accumulation the gradients of
the previous micro-batches. torch.compile decides what a block saves; the count is measured.
"""

from dataclasses import dataclass

import torch

from models.loss import CHUNK_TOKENS
from models.qwen3 import Qwen3
from optimizers.build import state_by_group
from training.run_config import RunConfig

GIB = 2**30
FP32 = 4
# of a checkpoint: an entry's zip archive around its values, and its part of .metadata
_ENTRY_BYTES = 1900


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory in bytes per rank.

    Attributes:
        weights: fp32 master weights of this rank's shard.
        gradients: fp32 gradients of this rank's shard during the loss; 0 without gradient accumulation.
        optimizer: Optimizer state of this rank's shard.
        average: fp32 average of this rank's shard of the weights; 0 without [average].
        gathered: Largest set of weights that is gathered, or cast on one rank, at a time.
        activations: Activations saved for the backward.
        loss: Logits of one chunk, twice in fp32 (their gradient replaces 16-bit ones), and the gradients
            computed by the loss.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    loss: float

    @property
    def peak(self) -> float:
        """Peak memory in bytes."""
        return sum(vars(self).values())


def _optimizer_state(config: RunConfig, model: Qwen3) -> list[torch.Tensor]:
    """Return the optimizers' state on the meta device, without scalars."""
    by_group = state_by_group(model.named_parameters(), config.optimizer.groups)
    return [tensor for tensors in by_group.values() for tensor in tensors]


def _activation_bytes(config: RunConfig, model: Qwen3) -> float:
    element = getattr(torch, config.training.precision).itemsize
    width, layers = model.config.dimensions.width, model.config.dimensions.num_layers
    by_block = model.num_saved_elements_per_token()
    total = sum(by_block)
    saved_by_mode = {None: total, "selective": layers * width + total / 2, "full": layers * width}
    saved = saved_by_mode[config.training.activation_checkpointing]
    if config.training.activation_checkpointing is not None:
        saved += max(by_block)  # the block that is being recomputed
    return config.tokens_per_micro_batch * element * (saved + 2 * width)


def checkpoint_bytes(config: RunConfig, model: Qwen3, world_size: int) -> int:
    """Return the bytes of a checkpoint over all ranks: fp32 weights, their average, optimizer state.

    Args:
        config: The run.
        model: Its model, on any device.
        world_size: Number of ranks.
    """
    _, shard = config.parallelism.degrees(world_size)
    # a tied weight is written under each of its names, its average once
    weights = list(model.state_dict().values())
    if config.average.decay is not None:
        weights += model.unwrapped_parameters().values()
    state = _optimizer_state(config, model)
    values = FP32 * sum(weight.numel() for weight in weights) + sum(tensor.nbytes for tensor in state)
    return round(values + _ENTRY_BYTES * (len(weights) + len(state)) * shard)


def estimate_memory(config: RunConfig, model: Qwen3, world_size: int) -> MemoryEstimate:
    """Estimate the peak memory of an optimizer step on each rank.

    Args:
        config: The run.
        model: Its model, on any device.
        world_size: Number of ranks.

    Returns:
        The parts, in bytes.

    Raises:
        UserError: The batch or the degrees of parallelism do not fit the number of ranks.
    """
    _, shard = config.parallelism.degrees(world_size)
    accumulates = config.gradient_accumulation_steps(world_size) > 1
    element = getattr(torch, config.training.precision).itemsize
    counts = model.num_parameters()
    blocks = counts["total"] - counts["embedding"]
    # one block computes while the next is prefetched, which one rank has no need of
    gathered_blocks = (1 if world_size == 1 else 2) * blocks / model.config.dimensions.num_layers
    if not config.parallelism.reshard_after_forward:
        gathered_blocks = float(blocks)
    has_copies = world_size > 1 or element < FP32
    logits = element * min(CHUNK_TOKENS, config.tokens_per_micro_batch) * config.model.vocab_size
    if element == FP32:
        logits *= 2  # with their gradient
    return MemoryEstimate(
        weights=FP32 * counts["total"] / shard,
        gradients=FP32 * counts["total"] / shard if accumulates else 0.0,
        optimizer=sum(tensor.nbytes for tensor in _optimizer_state(config, model)) / shard,
        average=0.0 if config.average.decay is None else FP32 * counts["total"] / shard,
        gathered=element * (counts["embedding"] + gathered_blocks) if has_copies else 0.0,
        activations=_activation_bytes(config, model),
        loss=logits + (FP32 + element) * counts["embedding"],
    )
