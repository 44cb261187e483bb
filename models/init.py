"""Initial weights, drawn tensor by tensor from a seed and the tensor's name.

Every rank draws the whole tensor on the CPU and keeps its shard, so the weights are the same to the bit on
any number of ranks and on any hardware. Matrices are normal (std of the config; those that write to the
residual stream are scaled by 1/sqrt(2 num_layers), as in GPT-2), gains are one, and the probe's gain is
r_gain_init. A W_R of low rank has a second factor of std 1/sqrt(rank), so that the product has the config's.
"""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.config import ParallaxConfig
from models.qwen3 import Qwen3


def clean_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _draw(name: str, shape: torch.Size, std: float, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _assign(parameter: nn.Parameter, full: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        full = full.to(parameter.dtype).to(parameter.device)
        parameter.copy_(distribute_tensor(full, mesh, placements, src_data_rank=None))
    else:
        parameter.copy_(full)


@torch.no_grad()
def init_weights(model: Qwen3, seed: int) -> None:
    """Set every parameter of a model, sharded or not.

    Args:
        model: A model off the meta device.
        seed: Seed of the run.
    """
    config = model.config
    residual_std = config.init_std / (2 * config.dimensions.num_layers) ** 0.5
    for wrapped_name, parameter in model.named_parameters():
        name = clean_name(wrapped_name)
        if name.endswith("r_norm.weight"):
            assert isinstance(config.attention, ParallaxConfig)
            parameter.fill_(config.attention.r_gain_init)
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("wr_out.weight"):
            _assign(parameter, _draw(name, parameter.shape, parameter.shape[1] ** -0.5, seed))
        else:
            std = (
                residual_std if name.endswith(("attention.wo.weight", "mlp.down.weight")) else config.init_std
            )
            _assign(parameter, _draw(name, parameter.shape, std, seed))
