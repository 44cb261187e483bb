"""GPU memory of a training step, from the shapes alone.

The fullest moment is the loss: fp32 masters, optimizer state, the gathered embedding, what every block keeps
for the backward, and one chunk of logits with the gradients made from it; with gradient accumulation the
gradients of the micro-batches before as well. torch.compile decides what a block keeps; the count is what it
was seen to keep.
"""

from dataclasses import dataclass

import torch

from models.loss import CHUNK_TOKENS
from models.qwen3 import Qwen3
from optimizers.param_groups import assign_parameters
from training.run_config import RunConfig

GIB = 2**30
FP32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank.

    Attributes:
        weights: fp32 masters of this rank's shard.
        gradients: fp32 gradients of this rank's shard, alive during the loss when micro-batches accumulate.
        optimizer: Optimizer state of this rank's shard.
        gathered: Weights that are gathered at one time.
        activations: What the forward keeps for the backward.
        loss: Logits of a chunk and the gradients that the loss makes.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    loss: float

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment."""
        parts = (self.weights, self.gradients, self.optimizer, self.gathered, self.activations, self.loss)
        return sum(parts)


def _optimizer_bytes(run: RunConfig, model: Qwen3) -> float:
    groups = run.optimizer.groups
    assigned = assign_parameters(model.named_parameters(), groups)
    states = {"muon": 1, "adamw": 2}
    return sum(FP32 * states[groups[name].kind] * p.numel() for name, ps in assigned.items() for p in ps)


def _activation_bytes(run: RunConfig, model: Qwen3) -> float:
    element = getattr(torch, run.training.precision).itemsize
    width, layers = model.config.dimensions.width, model.config.dimensions.num_layers
    saved = model.num_saved_elements_per_token()
    all_saved = sum(saved)
    kept_by_mode = {None: all_saved, "selective": layers * width + all_saved / 2, "full": layers * width}
    tokens = run.training.local_batch_size * run.training.seq_len
    kept = kept_by_mode[run.training.activation_checkpointing]
    if run.training.activation_checkpointing is not None:
        kept += max(saved)  # the block that is being recomputed
    return tokens * element * (kept + 2 * width)


def estimate_memory(run: RunConfig, model: Qwen3, world_size: int) -> MemoryEstimate:
    """Peak memory of a step on each of world_size ranks.

    Args:
        run: The run.
        model: Its model; the meta device will do.
        world_size: Number of ranks.

    Returns:
        The parts, in bytes.

    Raises:
        ValueError: The run does not fit that number of ranks.
    """
    _, shard = run.parallelism.degrees(world_size)
    accumulates = run.gradient_accumulation_steps(world_size) > 1
    element = getattr(torch, run.training.precision).itemsize
    counts = model.num_parameters()
    blocks = counts["total"] - counts["embedding"]
    gathered_blocks = 2 * blocks / model.config.dimensions.num_layers  # one at work, one on its way
    if not run.parallelism.reshard_after_forward:
        gathered_blocks = float(blocks)
    chunk = min(CHUNK_TOKENS, run.training.local_batch_size * run.training.seq_len)
    return MemoryEstimate(
        weights=FP32 * counts["total"] / shard,
        gradients=FP32 * counts["total"] / shard if accumulates else 0.0,
        optimizer=_optimizer_bytes(run, model) / shard,
        gathered=element * (counts["embedding"] + gathered_blocks),
        activations=_activation_bytes(run, model),
        loss=2 * element * chunk * run.model.vocab_size + (FP32 + element) * counts["embedding"],
    )
