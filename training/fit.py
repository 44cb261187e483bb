"""Whether a run fits the memory of a GPU, and what would fit."""

from dataclasses import replace

from models.qwen3 import Qwen3
from training.gpus import Gpu
from training.memory import GIB, estimate_memory
from training.run_config import RunConfig

# the estimate is within 5% of what softmax and Parallax take, and CUDA, NCCL and fragmentation take some
_SAFE_SHARE = 0.9


def describe_fit(config: RunConfig, model: Qwen3, world_size: int, gpu: Gpu) -> str:
    """Describe whether the estimated peak fits a GPU, and what to change where it does not.

    Args:
        config: The run.
        model: Its model, on any device.
        world_size: Number of ranks.
        gpu: The GPU.
    """
    peak = estimate_memory(config, model, world_size).peak / GIB
    room = f"{peak:.1f} GiB of the {gpu.memory_gib:.0f} GiB of {gpu.name}"
    if peak <= _SAFE_SHARE * gpu.memory_gib:
        return f"fits: {room}"
    verdict = "does not fit" if peak > gpu.memory_gib else "may not fit"
    return f"{verdict}: {room}; {_remedy(config, model, world_size, gpu)}"


def _remedy(config: RunConfig, model: Qwen3, world_size: int, gpu: Gpu) -> str:
    """Return the largest micro-batch that fits, with as little recomputation as possible."""
    training, modes = config.training, (None, "selective", "full")
    rows_per_rank = training.global_batch_size // world_size
    sizes = [n for n in range(training.local_batch_size, 0, -1) if rows_per_rank % n == 0]
    for mode in modes[modes.index(training.activation_checkpointing) :]:
        for size in sizes:
            smaller = replace(training, local_batch_size=size, activation_checkpointing=mode)
            memory = estimate_memory(replace(config, training=smaller), model, world_size)
            if memory.peak / GIB <= _SAFE_SHARE * gpu.memory_gib:
                changes = [f"training.local_batch_size {size}"] if size != training.local_batch_size else []
                if mode != training.activation_checkpointing:
                    changes.append(f'training.activation_checkpointing "{mode}"')
                return f"{' and '.join(changes)} would take {memory.peak / GIB:.1f} GiB"
    return "no micro-batch fits; take more ranks, or a larger GPU"
