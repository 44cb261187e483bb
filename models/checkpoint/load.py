"""Loads models and training states from run folders: the saved [model] table, and what a checkpoint holds."""

import warnings
from collections.abc import Mapping
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


def model_config(table: Table, checkpoint: Path) -> ModelConfig:
    """Decode the [model] table of a saved run.

    Args:
        table: From models.run_folder.read_run_table.
        checkpoint: The checkpoint that it describes, for error messages.

    Raises:
        ConfigError: An attention.kind, key or value that this version of the code does not have.
    """
    return from_table(ModelConfig, table["model"], RunFolder.of_checkpoint(checkpoint).config_file, "model")


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a model, in place; optimizer and other state are not read.

    Args:
        model: A Qwen3 of the architecture in the checkpoint, sharded or not, any dtype.
        checkpoint: From find_checkpoint.

    Raises:
        UserError: Weights are missing in the checkpoint or have other shapes (all are listed), or it is
            damaged.
    """
    assert isinstance(model, Qwen3)
    weights = {name: parameter.detach() for name, parameter in model.unwrapped_parameters().items()}
    load_tensors(weights, checkpoint)


def load_tensors(weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Load a checkpoint's weights into tensors, in place; a collective call where ranks exist.

    Args:
        weights: Tensors by the weights' names, sharded or not, any dtype.
        checkpoint: From find_checkpoint.

    Raises:
        UserError: As load_weights.
    """
    reader = open_checkpoint(checkpoint)
    _check_shapes({name: weight.shape for name, weight in weights.items()}, reader)
    _load(weights, reader)


def load_state(state: dict[str, Any], checkpoint: Path) -> None:
    """Load the state of a run, in place; a collective call.

    Args:
        state: As training saves it: tensors, values, and objects with state_dict and load_state_dict.
        checkpoint: Folder of the checkpoint.

    Raises:
        DamagedCheckpointError: On all ranks: it is damaged. Tensors may have been overwritten, other values
            not; `good` is the checkpoint to load instead.
    """
    _load(state, open_checkpoint(checkpoint))


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


def check_tensors(shapes: Mapping[str, torch.Size], checkpoint: Path) -> None:
    """Check that a checkpoint has weights of these names and shapes.

    Args:
        shapes: Global shapes by the weights' names.
        checkpoint: From find_checkpoint.

    Raises:
        UserError: Weights are missing in the checkpoint or have other shapes (lists them all), or its
            description is damaged.
    """
    _check_shapes(shapes, open_checkpoint(checkpoint))


def _check_shapes(shapes: Mapping[str, torch.Size], reader: CheckpointReader) -> None:
    saved = {name: list(size) for name, size in reader.index.tensor_sizes.items()}
    wrong = [
        f"{name} is {saved.get(name, 'missing')}, wanted {list(shape)}"
        for name, shape in shapes.items()
        if saved.get(name) != list(shape)
    ]
    if wrong:
        raise UserError(f"{reader.checkpoint} contains another model: {'; '.join(wrong)}")


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
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Qwen3:
    """Load the model of a run for evaluation.

    Args:
        path: A run folder for its newest checkpoint, or one of its checkpoints.
        device: Device of the model.
        dtype: Dtype of its weights; checkpoints of training hold fp32.

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
    load_weights(model, checkpoint)
    return model.eval().requires_grad_(False)
