"""Loads models from run folders: the saved [model] table, and the weights of a checkpoint."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from config import Table, from_table
from errors import UserError
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
        UserError: Weights are missing in the checkpoint or have other shapes (all are listed), or one of its
            files cannot be read.
    """
    assert isinstance(model, Qwen3)
    weights = {name: parameter.detach() for name, parameter in model.unwrapped_parameters().items()}
    load_tensors(weights, checkpoint)


def load_tensors(weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Load a checkpoint's weights into tensors, in place.

    Args:
        weights: Tensors by the weights' names, sharded or not, any dtype.
        checkpoint: From find_checkpoint.

    Raises:
        UserError: As load_weights.
    """
    check_tensors({name: weight.shape for name, weight in weights.items()}, checkpoint)
    reader = FileSystemReader(checkpoint)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(weights, storage_reader=reader, no_dist=not dist.is_initialized())
        except (EOFError, pickle.UnpicklingError, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise UserError(f"{checkpoint} cannot be read, it may be damaged: {reason}") from error


def check_tensors(shapes: Mapping[str, torch.Size], checkpoint: Path) -> None:
    """Check that a checkpoint has weights of these names and shapes.

    Args:
        shapes: Global shapes by the weights' names.
        checkpoint: From find_checkpoint.

    Raises:
        UserError: Weights are missing in the checkpoint or have other shapes; lists them all.
    """
    saved = {
        name: list(entry.size)
        for name, entry in FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wrong = [
        f"{name} is {saved.get(name, 'missing')}, wanted {list(shape)}"
        for name, shape in shapes.items()
        if saved.get(name) != list(shape)
    ]
    if wrong:
        raise UserError(f"{checkpoint} contains another model: {'; '.join(wrong)}")


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
