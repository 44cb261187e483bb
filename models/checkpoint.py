"""A model from a run folder: its saved [model] table, and the weights of one of its checkpoints."""

import pickle
import re
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from models.config import AttentionConfig, ModelConfig
from models.init import clean_name
from models.qwen3 import Qwen3
from models.sizes import ModelSize

_KINDS = {get_args(c.__annotations__["kind"])[0]: c for c in get_args(AttentionConfig)}


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """The folders step-N by step; other names, such as step-5.before, are what the user has set aside.

    Args:
        checkpoints: <run folder>/checkpoint.
    """
    names = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in checkpoints.glob("step-*"))
    return {int(name.group(1)): path for name, path in names if name is not None}


def whole_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Those of step_folders whose writing has ended."""
    found = step_folders(checkpoints)
    return {step: path for step, path in found.items() if (path / ".metadata").is_file()}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means.

    Args:
        path: A checkpoint (`<run folder>/checkpoint/step-N`), or a run folder for its newest whole one.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: There is none; says what was looked for.
    """
    if (path / ".metadata").exists():
        return path
    found = whole_checkpoints(path / "checkpoint")
    if not found:
        raise ValueError(
            f"{path} is no checkpoint: wanted a run folder with checkpoint/step-N/.metadata, or such a step-N"
        )
    return found[max(found)]


def run_table(checkpoint: Path) -> dict[str, Any]:
    """The resolved config of the run that wrote a checkpoint, as tables.

    Args:
        checkpoint: From find_checkpoint.

    Raises:
        ValueError: The run folder holds no config.toml.
    """
    path = checkpoint.parent.parent / "config.toml"
    if not path.exists():
        raise ValueError(
            f"{path} is missing: it says which model {checkpoint} holds; copy the whole run folder"
        )
    return tomllib.loads(path.read_text(encoding="utf-8"))


def model_config(table: dict[str, Any]) -> ModelConfig:
    """The [model] table of a saved run.

    Args:
        table: As run_table(...)["model"]: "none" stands for None.

    Raises:
        ValueError: A kind of attention, a key or a value that this version does not have.
    """
    values = _plain(table)
    attention = values.pop("attention", {})
    kind = attention.get("kind", "softmax")
    if kind not in _KINDS:
        raise ValueError(f"model.attention.kind is {kind!r}, wanted one of {', '.join(map(repr, _KINDS))}")
    try:
        if values.get("custom_size") is not None:
            values["custom_size"] = ModelSize(**values["custom_size"])
        return ModelConfig(attention=_KINDS[kind](**attention), **values)
    except TypeError as error:
        raise ValueError(f"the saved [model] table does not fit this version of the code: {error}") from None


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, dict) else None if value == "none" else value
        for key, value in table.items()
    }


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
            raise ValueError(f"{checkpoint} cannot be read, it may be damaged: {reason}") from error


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
        raise ValueError(f"{checkpoint} holds another model: {'; '.join(wrong)}")


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
        ValueError: As find_checkpoint, run_table, model_config and load_weights.
    """
    checkpoint = find_checkpoint(path)
    config = model_config(run_table(checkpoint)["model"])
    with torch.device("meta"):
        model = Qwen3(config)
    model = model.to_empty(device=device).to(dtype)
    if config.tie_embeddings:  # to_empty has taken them apart
        weight = model.tok_embeddings.weight
        assert isinstance(weight, nn.Parameter)
        model.output.weight = weight
    load_weights(model, checkpoint)
    return model.eval().requires_grad_(False)
