"""Initial weights, drawn tensor by tensor from a seed and the tensor's name.

Every rank draws the whole tensor on the CPU and keeps its shard, so the weights are the same to the bit on
any number of ranks and on any hardware. Matrices are normal (std of the config; those that write to the
residual stream are scaled by 1/sqrt(2 num_layers), as in GPT-2), gains are one, and the probe's gain is
r_gain_init. A W_R of low rank has a second factor of std 1/sqrt(rank), so that the product has the config's.
An attention can state other values for its own parameters (Attention.initial_value).
"""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.attention.base import Attention
from models.config import ModelConfig, ParallaxConfig
from models.qwen3 import Qwen3


def clean_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _draw(name: str, shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=_generator(name, seed))


def _assign(parameter: nn.Parameter, full: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        full = full.to(parameter.dtype).to(parameter.device)
        parameter.copy_(distribute_tensor(full, mesh, placements, src_data_rank=None))
    else:
        parameter.copy_(full)


def initial_weight(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """One parameter as a run starts with it.

    Args:
        config: The [model] table.
        name: The parameter's name, without wrappers.
        shape: Its shape.
        seed: Seed of the run.

    Returns:
        The whole tensor, fp32, on the CPU.

    Raises:
        ValueError: It is neither a matrix nor the gain of a norm.
    """
    if name.endswith("r_norm.weight"):
        assert isinstance(config.attention, ParallaxConfig)
        return torch.full(shape, config.attention.r_gain_init)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if len(shape) < 2:
        raise ValueError(
            f"{name} {tuple(shape)} has no initial value: it is neither a matrix nor the gain of a norm; "
            "return one from initial_value of its attention"
        )
    if name.endswith("wr_out.weight"):
        return _draw(name, shape, shape[1] ** -0.5, seed)
    writes_to_residual = name.endswith(("attention.wo.weight", "mlp.down.weight"))
    residual_std = config.init_std / (2 * config.dimensions.num_layers) ** 0.5
    return _draw(name, shape, residual_std if writes_to_residual else config.init_std, seed)


@torch.no_grad()
def init_weights(model: Qwen3, seed: int) -> None:
    """Set every parameter of a model, sharded or not.

    Args:
        model: A model off the meta device.
        seed: Seed of the run.
    """
    owners = {
        parameter: (module, name)
        for module in model.modules()
        if isinstance(module, Attention)
        for name, parameter in module.named_parameters()
    }
    for wrapped_name, parameter in model.named_parameters():
        name, full = clean_name(wrapped_name), None
        if parameter in owners:
            owner, own_name = owners[parameter]
            full = owner.initial_value(own_name, parameter.shape, _generator(name, seed))
        if full is None:
            full = initial_weight(model.config, name, parameter.shape, seed)
        _assign(parameter, full)
