"""Gradient scaling around a function whose backward underflows for small gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EXPONENT = 4
"""The largest element of the output's gradient becomes 2^3 to 2^4."""


class _Unscale(torch.autograd.Function):
    """Identity of the inputs, plus an empty tensor; backward divides by that tensor's gradient, the scale."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return (torch.empty((), device=inputs[0].device), *(x.view_as(x) for x in inputs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, *scaled = gradients
        return tuple(None if x is None or scale is None else x / scale.to(x.dtype) for x in scaled)


class _Scale(torch.autograd.Function):
    """Identity of the output; backward multiplies by a power of two, and returns it as carrier's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, carrier: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        largest = gradient.abs().amax().float()
        exponent = (_EXPONENT - largest.log2().ceil()).clamp(-100, 100)
        scale = torch.where(largest > 0, exponent.exp2(), 1.0)
        return gradient * scale.to(gradient.dtype), scale


def with_scaled_gradients(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Call a function whose backward runs on scaled gradients: up at its output, down again at its inputs.

    The training loss is divided by millions of tokens before the backward; a backward with absolute
    tolerances or 16-bit intermediates loses gradients of that size. The scale is a power of two, so that
    nothing is rounded, and is computed on the device without synchronization. It reaches the inputs' node as
    the gradient of a scalar, not through shared state: a graph can be differentiated repeatedly.

    Args:
        function: Takes the inputs; only its first result may receive a gradient.
        inputs: Floating-point tensors of any shapes.

    Returns:
        The function's results.
    """
    carrier, *unscaled = _Unscale.apply(*inputs)
    first, *others = function(*unscaled)
    return (_Scale.apply(first, carrier), *others)
