"""A model from a run folder: its saved [model] table, and the weights of one of its checkpoints."""

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
from models.init import clean_name
from models.qwen3 import Qwen3
from models.run_folder import RunFolder, find_checkpoint, read_run_table


def model_config(table: Table, checkpoint: Path) -> ModelConfig:
    """Decode the [model] table of a saved run.

    Args:
        table: From models.run_folder.read_run_table.
        checkpoint: The checkpoint that it describes, for error messages.

    Raises:
        ConfigError: A kind of attention, a key or a value that this version does not have.
    """
    return from_table(ModelConfig, table["model"], RunFolder.of_checkpoint(checkpoint).config_file, "model")


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a model, in place; nothing else of the checkpoint is read.

    Args:
        model: With the architecture of the run that wrote the checkpoint, sharded or not, any dtype.
        checkpoint: From find_checkpoint.

    Raises:
        ValueError: Weights are missing there, or have other shapes; names them all.
    """
    load_tensors({clean_name(name): weight.detach() for name, weight in model.named_parameters()}, checkpoint)


def load_tensors(weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Fill tensors with a checkpoint's weights, in place; nothing else of the checkpoint is read.

    Args:
        weights: Tensors by the weights' names, sharded or not, any dtype.
        checkpoint: From find_checkpoint.

    Raises:
        ValueError: As in load_weights, or a file of it cannot be read.
    """
    check_tensors({name: weight.shape for name, weight in weights.items()}, checkpoint)
    reader = FileSystemReader(checkpoint)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        try:
            dcp.load(weights, storage_reader=reader, no_dist=not dist.is_initialized())
        except (EOFError, pickle.UnpicklingError, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise UserError(f"{checkpoint} cannot be read, it may be damaged: {reason}") from error


def check_tensors(shapes: Mapping[str, torch.Size], checkpoint: Path) -> None:
    """Refuse a checkpoint that lacks weights.

    Args:
        shapes: Whole shapes by the weights' names.
        checkpoint: From find_checkpoint.

    Raises:
        ValueError: As in load_weights.
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
        raise UserError(f"{checkpoint} holds another model: {'; '.join(wrong)}")


def load_model(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Qwen3:
    """The model of a run, ready to evaluate.

    Args:
        path: As for find_checkpoint.
        device: Where it goes.
        dtype: Dtype of its weights; checkpoints hold fp32.

    Returns:
        The model in eval mode; gradients are off.

    Raises:
        UserError: As find_checkpoint, read_run_table, model_config and load_weights.
    """
    checkpoint = find_checkpoint(path)
    config = model_config(read_run_table(checkpoint), checkpoint)
    with torch.device("meta"):
        model = Qwen3(config)
    model = model.to_empty(device=device).to(dtype)
    if config.tie_embeddings:  # to_empty has taken them apart
        weight = model.tok_embeddings.weight
        assert isinstance(weight, nn.Parameter)
        model.output.weight = weight
    load_weights(model, checkpoint)
    return model.eval().requires_grad_(False)
