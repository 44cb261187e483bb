"""Gradient scaling around a backward that underflows."""

from typing import Any

import pytest
import torch

from models.attention.recurrent.gradient_scale import with_scaled_gradients


class _UnderflowingProduct(torch.autograd.Function):
    """x * y, with a backward that loses small gradients as that of fla's MesaNet does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,) = gradients
        x, y = ctx.saved_tensors
        kept = gradient.half().to(gradient.dtype) * gradient.abs() / (gradient.abs() + 1e-5)
        return kept * y, kept * x


def underflowing_product(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (_UnderflowingProduct.apply(x, y),)


@pytest.mark.parametrize("exponent", [-60, -22, 0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_magnitude_are_exact(exponent: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, weight = (torch.randn(50, generator=generator).to(dtype).requires_grad_() for _ in range(3))

    def gradients(function: Any, scale: float) -> tuple[torch.Tensor, ...]:
        (out,) = function(x, y)
        return torch.autograd.grad((out * weight.detach() * scale).sum(), (x, y))

    exact = gradients(lambda x, y: (x * y,), 2.0**exponent)
    scaled = gradients(lambda x, y: with_scaled_gradients(underflowing_product, x, y), 2.0**exponent)
    for got, wanted in zip(scaled, exact, strict=True):
        assert (got - wanted).float().norm() < 5e-3 * wanted.float().norm()
    if exponent == -22:
        underflowed = gradients(underflowing_product, 2.0**exponent)
        assert (underflowed[0] - exact[0]).float().norm() > 0.5 * exact[0].float().norm()


def test_a_second_backward_through_a_retained_graph_gives_the_same_gradients() -> None:
    x, y = (torch.linspace(1, 2, 5).requires_grad_() for _ in range(2))
    (out,) = with_scaled_gradients(lambda x, y: (x * y,), x, y)
    loss = (out * 2.0**-22).sum()
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y), retain_graph=True)
    other_scale = torch.autograd.grad((out * 2.0**-10).sum(), (x, y))
    for a, b, c in zip(first, second, other_scale, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, a * 2**12)


def test_zero_gradients_stay_zero_and_other_results_are_returned() -> None:
    x = torch.ones(3, requires_grad=True)
    out, extra = with_scaled_gradients(lambda x: (2 * x, x.detach()), x)
    (out * 0).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert torch.equal(extra, torch.ones(3))
    with torch.no_grad():
        assert not with_scaled_gradients(lambda x: (2 * x,), x)[0].requires_grad
