"""Products of tensors and a factor on the device: those of PyTorch, rounded once."""

from pathlib import Path

import pytest
import torch

from models.kernels.scale import scale, serves
from tests.interpreter import run_interpreted

INTERPRETED = Path(__file__).with_name("interpreted_scale.py")


def test_the_kernel_in_interpreter() -> None:
    run_interpreted(INTERPRETED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_factor_is_not_rounded_to_the_tensors_dtype(dtype: torch.dtype) -> None:
    # its rounding to bf16 would move all elements the same way
    factor = torch.tensor(1.0 + 2**-8, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(7, 9).to(dtype)
    assert not serves(x, factor, dtype)
    assert torch.equal(scale(x, factor, dtype), (x.double() * factor.double()).to(dtype))


def test_the_result_has_the_tensors_shape() -> None:
    assert scale(torch.ones(()), torch.full((1,), 2.0), torch.float32).shape == ()
    with pytest.raises(AssertionError):
        scale(torch.ones(4, 8), torch.ones(8), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2047,), (151936, 1024), (2**31 + 5,)], ids=str)
def test_products_on_a_gpu_are_those_of_pytorch(shape: tuple[int, ...], asked: torch.dtype) -> None:
    x, factor = torch.randn(shape, device="cuda", dtype=torch.bfloat16), torch.tensor(1.7, device="cuda")
    assert serves(x, factor, asked)
    y = scale(x, factor, asked)
    for start in range(0, x.numel(), 2**28):
        part = slice(start, start + 2**28)
        assert torch.equal(y.flatten()[part], (x.flatten()[part].float() * factor).to(asked))


@pytest.mark.gpu
def test_transposed_tensors_are_left_to_pytorch() -> None:
    x, factor = torch.randn(4, 8, device="cuda").T, torch.tensor(1.7, device="cuda")
    assert not serves(x, factor, torch.bfloat16)
    assert torch.equal(scale(x, factor, torch.bfloat16), (x * factor).bfloat16())
