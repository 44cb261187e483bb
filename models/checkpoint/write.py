"""Write a checkpoint of weights alone, one tensor in memory at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex


class _LazyPlanner(DefaultSavePlanner):
    """Saves a state dict of meta tensors, each of which is read just before it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._read(index.fqn)


def write_weights(
    checkpoint: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor],
) -> None:
    """Write a checkpoint of weights.

    Args:
        checkpoint: Folder step-N to write.
        shapes: Shapes by the weights' names.
        dtype: Their dtype.
        read: Returns a weight by its name, of that shape and dtype.
    """
    weights = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    # one file per tensor: the writer keeps all tensors of a file in memory
    writer = FileSystemWriter(checkpoint, single_file_per_rank=False)
    dcp.save(weights, storage_writer=writer, planner=_LazyPlanner(read), no_dist=True)
