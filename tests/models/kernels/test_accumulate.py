"""Sums of 16-bit gradients in fp32: those of PyTorch, bit by bit."""

from pathlib import Path

import pytest
import torch

from models.kernels.accumulate import accumulate_, serves
from tests.interpreter import run_interpreted

INTERPRETED = Path(__file__).with_name("interpreted_accumulate.py")


def test_the_kernel_in_interpreter() -> None:
    run_interpreted(INTERPRETED)


def test_the_cpu_takes_pytorchs_addition() -> None:
    total, x = torch.randn(7, 9), torch.randn(7, 9).bfloat16()
    assert not serves(total, x)
    expected = total + x
    accumulate_(total, x)
    assert torch.equal(total, expected)


def test_tensors_of_other_shapes_are_refused() -> None:
    with pytest.raises(AssertionError):
        accumulate_(torch.zeros(4), torch.zeros(1).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2047,), (1024, 3072), (151936, 1024), (2**31 + 5,)], ids=str)
def test_sums_on_a_gpu_are_those_of_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    total = torch.randn(shape, device="cuda")
    x = torch.randn(shape, device="cuda", dtype=dtype)
    assert serves(total, x)
    expected = total + x
    accumulate_(total, x)
    assert torch.equal(total, expected)


@pytest.mark.gpu
def test_transposed_gradients_are_left_to_pytorch() -> None:
    total, x = torch.randn(8, 4, device="cuda"), torch.randn(4, 8, device="cuda").bfloat16().T
    assert not serves(total, x)
    expected = total + x
    accumulate_(total, x)
    assert torch.equal(total, expected)
