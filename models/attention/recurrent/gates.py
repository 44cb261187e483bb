"""Decays of the state from the input, and where their parameters start (as in Mamba-2 and fla)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_STEP, _MAX_STEP = 1e-3, 0.1


def step_size(x: Tensor, bias: Tensor) -> Tensor:
    """softplus(x + bias), in at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.softplus(x.to(dtype) + bias.to(dtype))


def rate(a_log: Tensor, like: Tensor) -> Tensor:
    """-exp(a_log), the logarithm of the decay per unit of step size, in the dtype of `like`."""
    return -a_log.to(like.dtype).exp()


def initial_a_log(shape: torch.Size, lowest: float, generator: torch.Generator) -> Tensor:
    """The logarithm of rates that are uniform between `lowest` and 16."""
    # a rate of 0 would have no logarithm
    return torch.empty(shape).uniform_(lowest, 16.0, generator=generator).clamp(min=1e-4).log()


def initial_dt_bias(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The bias at which step sizes are log-uniform between 0.001 and 0.1."""
    low, high = math.log(_MIN_STEP), math.log(_MAX_STEP)
    step = torch.empty(shape).uniform_(low, high, generator=generator).exp()
    return step + torch.log(-torch.expm1(-step))
