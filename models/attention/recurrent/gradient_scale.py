"""Gradients of usual size for a function whose backward is exact for such only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EXPONENT = 4
"""The largest element of the output's gradient becomes 2^3 to 2^4."""


class _Identity(torch.autograd.Function):
    """Identity whose backward the two below say; they share the list `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)


class _Enlarge(_Identity):
    """Identity; backward multiplies by a power of two, which it leaves in `scale`."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        largest = gradient.abs().amax().float()
        exponent = (_EXPONENT - largest.log2().ceil()).clamp(-100, 100)
        scale = torch.where(largest > 0, exponent.exp2(), 1.0)
        ctx.scale.append(scale)
        return gradient * scale.to(gradient.dtype), None


class _Reduce(_Identity):
    """Identity; backward divides by what _Enlarge multiplied with."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        for scale in ctx.scale:
            gradient = gradient / scale.to(gradient.dtype)
        return gradient, None


def with_gradients_of_usual_size(
    function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Call a function; in its backward, gradients are scaled up before it and down after it.

    The scale is a power of two, found on the device: it rounds nothing, and nothing waits for it. A training
    step divides the loss by millions of tokens before the backward, and a backward with absolute tolerances
    or 16-bit results loses such gradients.

    Args:
        function: Takes the inputs; its first result is what gradients come to, none come to the others.
        inputs: Tensors `[...]`, floating.

    Returns:
        What the function returns.
    """
    scale: list[Tensor] = []
    first, *others = function(*(_Reduce.apply(x, scale) for x in inputs))
    return (_Enlarge.apply(first, scale), *others)
