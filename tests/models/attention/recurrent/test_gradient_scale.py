"""Gradients through a backward that is exact for those of usual size only."""

from typing import Any

import pytest
import torch

from models.attention.recurrent.gradient_scale import with_gradients_of_usual_size


class _Coarse(torch.autograd.Function):
    """x * y, with a backward that loses small gradients as fla's MesaNet does."""

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


@pytest.mark.parametrize("exponent", [-60, -22, 0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_size_come_through(exponent: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, weight = (torch.randn(50, generator=generator).to(dtype).requires_grad_() for _ in range(3))

    def gradients(function: Any, scale: float) -> tuple[torch.Tensor, ...]:
        (out,) = function(x, y)
        return torch.autograd.grad((out * weight.detach() * scale).sum(), (x, y))

    def coarse(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (_Coarse.apply(x, y),)

    exact = gradients(lambda x, y: (x * y,), 2.0**exponent)
    scaled = gradients(lambda x, y: with_gradients_of_usual_size(coarse, x, y), 2.0**exponent)
    for got, wanted in zip(scaled, exact, strict=True):
        assert (got - wanted).float().norm() < 5e-3 * wanted.float().norm()
    if exponent == -22:
        lost = gradients(coarse, 2.0**exponent)
        assert (lost[0] - exact[0]).float().norm() > 0.5 * exact[0].float().norm()


def test_zero_gradients_stay_zero_and_other_results_pass() -> None:
    x = torch.ones(3, requires_grad=True)
    out, extra = with_gradients_of_usual_size(lambda x: (2 * x, x.detach()), x)
    (out * 0).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    assert torch.equal(extra, torch.ones(3))
