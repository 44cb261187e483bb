"""Input-dependent decays of a state, and the initial values of their parameters, as in Mamba-2 and fla."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_STEP, _MAX_STEP = 1e-3, 0.1


def step_size(x: Tensor, bias: Tensor) -> Tensor:
    """Compute softplus(x + bias) in at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.softplus(x.to(dtype) + bias.to(dtype))


def log_decay_rate(a_log: Tensor, like: Tensor) -> Tensor:
    """Compute -exp(a_log), the logarithm of the decay per unit of step size, in the dtype of `like`."""
    return -a_log.to(like.dtype).exp()


def initial_a_log(shape: torch.Size, lowest: float, generator: torch.Generator) -> Tensor:
    """Draw a_log such that the rates exp(a_log) are uniform between `lowest` and 16."""
    # clamped, since a rate of 0 has no finite logarithm
    return torch.empty(shape).uniform_(lowest, 16.0, generator=generator).clamp(min=1e-4).log()


def initial_dt_bias(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw dt_bias such that the step sizes softplus(dt_bias) are log-uniform between 0.001 and 0.1."""
    low, high = math.log(_MIN_STEP), math.log(_MAX_STEP)
    step = torch.empty(shape).uniform_(low, high, generator=generator).exp()
    return step + torch.log(-torch.expm1(-step))
