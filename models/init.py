"""Initial weights, each drawn from a generator that is seeded by the run's seed and the parameter's name.

Every rank draws the whole tensor on the CPU and keeps its shard: the weights are bit-identical on any number
of ranks and on any hardware.

    matrices                 normal with std init_std
    attention.wo, mlp.down   normal with std init_std / sqrt(2 num_layers), as in GPT-2: their outputs are
                             added to the residual stream
    wr_out (low-rank W_R)    normal with std 1 / sqrt(rank), so that wr_out wr_in has std init_std
    gains of norms           1; the probe's r_gain_init
    others                   Attention.initial_value of their module
"""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from errors import UserError
from models.config import ModelConfig, ParallaxConfig
from models.qwen3 import Qwen3


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
    """Draw the initial value of a matrix or a norm's gain.

    Args:
        config: The [model] table.
        name: The parameter's name in the unwrapped model.
        shape: Its global shape.
        seed: Seed of the run.

    Returns:
        The whole tensor, fp32, on the CPU.

    Raises:
        UserError: The parameter is neither a matrix nor the gain of a norm.
    """
    if name.endswith("r_norm.weight"):
        assert isinstance(config.attention, ParallaxConfig)
        return torch.full(shape, config.attention.r_gain_init)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if len(shape) < 2:
        raise UserError(
            f"{name} {tuple(shape)} has no initial value: it is neither a matrix nor the gain of a norm; "
            "return one from initial_value of its attention module"
        )
    if name.endswith("wr_out.weight"):
        return _draw(name, shape, shape[1] ** -0.5, seed)
    writes_to_residual = name.endswith(("attention.wo.weight", "mlp.down.weight"))
    residual_std = config.init_std / (2 * config.dimensions.num_layers) ** 0.5
    return _draw(name, shape, residual_std if writes_to_residual else config.init_std, seed)


@torch.no_grad()
def init_weights(model: Qwen3, seed: int) -> None:
    """Initialize every parameter of a model, sharded or not.

    Args:
        model: A model that is not on the meta device.
        seed: Seed of the run.
    """
    owners = {
        parameter: (module, name)
        for module in model.attention_modules()
        for name, parameter in module.named_parameters()
    }
    for name, parameter in model.unwrapped_parameters().items():
        full = None
        if parameter in owners:
            owner, own_name = owners[parameter]
            full = owner.initial_value(own_name, parameter.shape, _generator(name, seed))
        if full is None:
            full = initial_weight(model.config, name, parameter.shape, seed)
        _assign(parameter, full)
