"""End a run in one line when a GPU is out of memory, or another rank is gone or never came."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.memory import GIB, estimate_memory
from training.preflight import build_meta_model
from training.rank_monitor import RankMonitor
from training.run_config import RunConfig

# of a GPU: reserved but not allocated, from where on fragmentation is worth a word
_FRAGMENTED = 0.1


@contextmanager
def one_line_failures(config: RunConfig, monitor: RankMonitor, world_size: int) -> Iterator[None]:
    """End the run in one line where the GPU is out of memory or the connection to another rank is lost.

    Args:
        config: The run.
        monitor: Names the ranks that are gone; ends all of them.
        world_size: Number of ranks.

    Raises:
        RunError: The GPU of a single rank is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        monitor.fail(lambda: describe_out_of_memory(config, world_size, monitor.place, memory_use()))
    except RuntimeError as error:
        if is_lost_connection(error):
            lost = error  # whose name ends with this block
            monitor.fail(lambda: monitor.describe_lost_rank(lost))
        raise


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed since another rank, or the way to it, is gone."""
    # gloo raises plain RuntimeErrors, with the file of its own that did
    return isinstance(error, dist.DistError) or "gloo/transport/" in str(error)


def describe_missing_ranks(error: RuntimeError) -> str:
    """Describe in one line why the ranks did not connect.

    Args:
        error: From the start of the process group.
    """
    rank, size, address, port = (
        os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    return (
        f"rank {rank} did not find all {size} ranks at {address}:{port} ({str(error).splitlines()[0]}); "
        "start all of them, or set another MASTER_ADDR or MASTER_PORT"
    )


@dataclass(frozen=True)
class MemoryUse:
    """Memory of this rank's GPU, in bytes.

    Attributes:
        allocated: Held by tensors.
        reserved: Held by torch's allocator: allocated, and cached for later.
        peak: Largest `allocated` so far.
        free: Free on the GPU.
        total: Of the GPU.
    """

    allocated: float
    reserved: float
    peak: float
    free: float
    total: float


def memory_use() -> MemoryUse:
    """Measure the memory of this rank's GPU."""
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    return MemoryUse(torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), peak, free, total)


def describe_out_of_memory(config: RunConfig, world_size: int, place: str, use: MemoryUse) -> str:
    """Describe in one line what the GPU's memory was used for, and the keys that lower it.

    Args:
        config: The run.
        world_size: Number of ranks.
        place: The rank and its phase.
        use: The GPU's memory.
    """
    predicted = estimate_memory(config, build_meta_model(config), world_size).peak
    others = max(0.0, use.total - use.free - use.reserved)
    parts = {
        "allocated": use.allocated,
        "reserved by torch": use.reserved,
        "peak": use.peak,
        "free": use.free,
    }
    numbers = ", ".join(f"{_gib(size)} {name}" for name, size in parts.items())
    return (
        f"{place}: the GPU is out of memory: of {_gib(use.total)}, {numbers}, {_gib(others)} in use outside "
        f"torch's allocator (NCCL, CUDA, other processes); --dry-run predicts a peak of {_gib(predicted)}. "
        f"{_remedies(config, use)}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _remedies(config: RunConfig, use: MemoryUse) -> str:
    training = config.training
    keys = []
    if training.local_batch_size > 1:
        keys.append(f"training.local_batch_size (now {training.local_batch_size}) lower")
    if training.activation_checkpointing != "full":
        stronger = '"selective" or "full"' if training.activation_checkpointing is None else '"full"'
        keys.append(f"training.activation_checkpointing to {stronger}")
    if not config.parallelism.reshard_after_forward:
        keys.append("parallelism.reshard_after_forward to true")
    if config.parallelism.replicate > 1:
        keys.append(f"parallelism.replicate (now {config.parallelism.replicate}) lower")
    remedy = (
        f"Set {', or '.join(keys)}" if keys else "Train on more ranks, or with a shorter training.seq_len"
    )
    if use.reserved - use.allocated > _FRAGMENTED * use.total:
        remedy += ", or PYTORCH_ALLOC_CONF=expandable_segments:True in the environment against fragmentation"
    return remedy
