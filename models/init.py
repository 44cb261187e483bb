"""Initial weights, each drawn from a generator that is seeded by the run's seed and the parameter's name.

Every rank draws the whole tensor on the CPU and keeps its shard: the weights are bit-identical on any number
of ranks and on any hardware.

    matrices                 normal with std init_std
    attention.wo, mlp.down   normal with std init_std / sqrt(2 num_layers), as in GPT-2: their outputs are
                             added to the residual stream
    gains of norms           1

Attention.initial_value of the module that a parameter belongs to comes first.
"""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from errors import UserError
from models.qwen3 import Qwen3


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _assign(parameter: nn.Parameter, full: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        full = full.to(parameter.dtype).to(parameter.device)
        parameter.copy_(distribute_tensor(full, mesh, placements, src_data_rank=None))
    else:
        parameter.copy_(full)


class InitialWeights:
    """Draws the initial values of a model's parameters.

    Args:
        model: The model, on any device, sharded or not; only its names and shapes are read.
        seed: Seed of the run.
    """

    def __init__(self, model: Qwen3, seed: int) -> None:
        self.config, self.seed = model.config, seed
        self.parameters = model.unwrapped_parameters()
        self._owners = {
            parameter: (module, name)
            for module in model.attention_modules()
            for name, parameter in module.named_parameters()
        }

    def draw(self, name: str) -> torch.Tensor:
        """Draw the initial value of a parameter.

        Args:
            name: Its name in the unwrapped model.

        Returns:
            The whole tensor, fp32, on the CPU.

        Raises:
            UserError: It is neither a matrix nor the gain of a norm, and its attention module gives no value.
        """
        shape, generator = self.parameters[name].shape, _generator(name, self.seed)
        if self.parameters[name] in self._owners:
            owner, own_name = self._owners[self.parameters[name]]
            value = owner.initial_value(own_name, shape, generator)
            if value is not None:
                return value
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if len(shape) < 2:
            raise UserError(
                f"{name} {tuple(shape)} has no initial value: it is neither a matrix nor the gain of a norm; "
                "return one from initial_value of its attention module"
            )
        writes_to_residual = name.endswith(("attention.wo.weight", "mlp.down.weight"))
        residual_std = self.config.init_std / (2 * self.config.dimensions.num_layers) ** 0.5
        std = residual_std if writes_to_residual else self.config.init_std
        return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_weights(model: Qwen3, seed: int) -> None:
    """Initialize every parameter of a model, sharded or not.

    Args:
        model: A model that is not on the meta device.
        seed: Seed of the run.
    """
    initial = InitialWeights(model, seed)
    for name, parameter in initial.parameters.items():
        _assign(parameter, initial.draw(name))
