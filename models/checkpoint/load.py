"""Loads models and training states from run folders: the saved [model] table, and what a checkpoint holds."""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from config import Table, from_table
from errors import UserError
from models.checkpoint.metadata import DamagedCheckpointError
from models.checkpoint.reader import CheckpointReader
from models.checkpoint.verify import newest_good
from models.config import ModelConfig
from models.qwen3 import Qwen3
from models.run_folder import RunFolder, find_checkpoint, read_run_table

AVERAGE = "average"
"""The state of a checkpoint that holds the average of the weights, by their names."""


def model_config(table: Table, checkpoint: Path) -> ModelConfig:
    """Decode the [model] table of a saved run.

    Args:
        table: From models.run_folder.read_run_table.
        checkpoint: The checkpoint that it describes, for error messages.

    Raises:
        ConfigError: An attention.kind, key or value that this version of the code does not have.
    """
    return from_table(ModelConfig, table["model"], RunFolder.of_checkpoint(checkpoint).config_file, "model")


class SavedWeights:
    """The weights in a checkpoint, after its step or averaged over steps.

    Args:
        checkpoint: From find_checkpoint.
        average: The average that training keeps ([average]), instead of the weights after the step.

    Raises:
        UserError: The checkpoint's description is damaged, or it has no average.
    """

    def __init__(self, checkpoint: Path, *, average: bool = False) -> None:
        self._reader = open_checkpoint(checkpoint)
        self._prefix = f"{AVERAGE}." if average else ""
        if not any(name.startswith(self._prefix) for name in self._reader.index.tensor_sizes):
            raise UserError(
                f"{checkpoint} has no average of the weights, which training keeps where average.decay is "
                "set: leave --average away, or average checkpoints with `python -m models.average`"
            )

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Check that there are weights of these names and global shapes.

        Raises:
            UserError: Weights are missing or have other shapes; lists them all.
        """
        sizes = self._reader.index.tensor_sizes
        saved = {name: sizes.get(f"{self._prefix}{name}") for name in shapes}
        wrong = [
            f"{name} is {'missing' if size is None else list(size)}, wanted {list(shapes[name])}"
            for name, size in saved.items()
            if size != shapes[name]
        ]
        if wrong:
            raise UserError(f"{self._reader.checkpoint} contains another model: {'; '.join(wrong)}")

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load weights into tensors, in place; a collective call where ranks exist.

        Args:
            weights: Tensors by the weights' names, sharded or not, any dtype.

        Raises:
            UserError: As check, or the checkpoint is damaged.
        """
        self.check({name: weight.shape for name, weight in weights.items()})
        _load({f"{self._prefix}{name}": weight for name, weight in weights.items()}, self._reader)


def load_weights(model: nn.Module, checkpoint: Path, *, average: bool = False) -> None:
    """Load a checkpoint's weights into a model, in place; optimizer and other state are not read.

    Args:
        model: A Qwen3 of the architecture in the checkpoint, sharded or not, any dtype.
        checkpoint: From find_checkpoint.
        average: As for SavedWeights.

    Raises:
        UserError: Weights are missing in the checkpoint or have other shapes (all are listed), or it is
            damaged; or it has no average.
    """
    assert isinstance(model, Qwen3)
    weights = {name: parameter.detach() for name, parameter in model.unwrapped_parameters().items()}
    SavedWeights(checkpoint, average=average).load(weights)


def load_state(state: dict[str, Any], checkpoint: Path, *, optional: Collection[str] = ()) -> None:
    """Load the state of a run, in place; a collective call.

    Args:
        state: As training saves it: tensors, values, and objects with state_dict and load_state_dict.
        checkpoint: Folder of the checkpoint.
        optional: Names in `state` that the checkpoint may lack: they are removed from `state`.

    Raises:
        DamagedCheckpointError: On all ranks: it is damaged. Tensors may have been overwritten, other values
            not; `good` is the checkpoint to load instead.
    """
    reader = open_checkpoint(checkpoint)
    saved = {name.partition(".")[0] for name in reader.index.metadata.state_dict_metadata}
    for name in {*optional} - saved:
        state.pop(name, None)
    _load(state, reader)


def open_checkpoint(checkpoint: Path) -> CheckpointReader:
    """Open a checkpoint; a collective call where ranks exist.

    Args:
        checkpoint: From find_checkpoint.

    Raises:
        DamagedCheckpointError: On all ranks: the checkpoint's description is damaged.
    """
    reader, error = None, None
    try:
        reader = CheckpointReader(checkpoint)
    except DamagedCheckpointError as damage:
        error = damage
    errors: list[DamagedCheckpointError | None] = [error]
    if dist.is_initialized():
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error)
    found = next((each for each in errors if each is not None), None)
    if found is not None:
        raise _with_good(found, checkpoint) from error
    assert reader is not None
    return reader


def _load(state: dict[str, Any], reader: CheckpointReader) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            # by rank, the same on all ranks
            found = (_as_damage(failure, reader.checkpoint) for failure, _ in error.failures.values())
            damage = next((each for each in found if each is not None), None)
            if damage is None:
                raise
            raise _with_good(damage, reader.checkpoint) from None


def _as_damage(failure: BaseException, checkpoint: Path) -> DamagedCheckpointError | None:
    """Return the damage that made a load fail; None for a fault of the code."""
    if isinstance(failure, DamagedCheckpointError):
        return failure
    # of torch's planner; the configs of run and launch have been compared before
    if str(failure).startswith(("Missing key in checkpoint", "Size mismatch between saved")):
        return DamagedCheckpointError(f"{checkpoint} holds another state: {str(failure).splitlines()[0]}")
    return None


def _with_good(damage: DamagedCheckpointError, checkpoint: Path) -> DamagedCheckpointError:
    """Add the newest good checkpoint of the same run to an error; a collective call where ranks exist."""
    found: list[Path | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = [newest_good(checkpoint)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    others = "no other checkpoint beside it is good" if found[0] is None else f"{found[0]} is good"
    result = DamagedCheckpointError(f"{damage}; {others}")
    result.good = found[0]
    return result


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    average: bool = False,
) -> Qwen3:
    """Load the model of a run for evaluation.

    Args:
        path: A run folder for its newest checkpoint, or one of its checkpoints.
        device: Device of the model.
        dtype: Dtype of its weights; checkpoints of training hold fp32.
        average: As for SavedWeights.

    Returns:
        The model in eval mode; its parameters do not require gradients.

    Raises:
        UserError: As find_checkpoint, read_run_table, model_config and load_weights.
    """
    checkpoint = find_checkpoint(path)
    config = model_config(read_run_table(checkpoint), checkpoint)
    with torch.device("meta"):
        model = Qwen3(config).to(dtype)
    model.materialize(device)
    load_weights(model, checkpoint, average=average)
    return model.eval().requires_grad_(False)
