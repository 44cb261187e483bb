"""Whether forward and backward of micro-batches are replayed as CUDA graphs, and if not, why."""

import torch

from models.qwen3 import Qwen3
from training.run_config import TrainingConfig


def supports_replay(model: Qwen3) -> bool:
    """Return whether the attention of every block can be replayed."""
    return all(module.forward_supports_cuda_graph for module in model.attention_modules())


def missing_kernels(model: Qwen3) -> str | None:
    """Return why softmax attention or Parallax does without our kernels; None if not, or for other kinds."""
    kind = model.config.attention.kind
    if kind not in ("softmax", "parallax") or supports_replay(model):
        return None
    return f"{kind} runs without our kernels, by attention.impl or head_dim"


def replay_refusal(model: Qwen3, config: TrainingConfig) -> str | None:
    """Return why micro-batches are not replayed on any GPU, or None if they are.

    Args:
        model: The model, on any device.
        config: The [training] table.
    """
    if not config.cuda_graphs:
        return "training.cuda_graphs is false"
    if config.activation_checkpointing is not None:
        return "training.activation_checkpointing reads the state of the random generators"
    if supports_replay(model):
        return None
    kind = model.config.attention.kind
    return missing_kernels(model) or (
        f"attention.kind {kind} waits for the device, or its shapes follow the documents"
    )


def graph_refusal(model: Qwen3, config: TrainingConfig, device: torch.device) -> str | None:
    """Return why micro-batches are not replayed on a device, or None if they are."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "they need a GPU of compute capability 8.0"
    return replay_refusal(model, config)
