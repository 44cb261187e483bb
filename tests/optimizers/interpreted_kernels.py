"""Muon's Triton kernels in the interpreter; test_kernels.py runs this file with TRITON_INTERPRET=1."""

import os

import pytest
import torch
from torch import Tensor

from optimizers.kernels import elementwise, symmetric

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels.py runs this file"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("m", "k"), [(128, 64), (200, 130), (300, 520)])
@pytest.mark.parametrize("is_tall", [False, True])
def test_gram_matrix(m: int, k: int, is_tall: bool) -> None:
    # sums of integers are exact in any order, and the order differs between processors
    for x, rtol, atol in (
        (torch.randn(2, m, k) / k**0.5, 1e-4, 1e-5),
        (torch.randint(-8, 9, (2, m, k)).float(), 0.0, 0.0),
    ):
        stored = x.mT.contiguous() if is_tall else x
        gram = symmetric.launch(stored, stored, None, is_tall, 1.0, 0.0, 0.0)
        torch.testing.assert_close(gram, x @ x.mT, rtol=rtol, atol=atol)
        i_tile = torch.arange(m) // symmetric.BLOCK_M
        is_written_twice = i_tile[:, None] != i_tile[None, :]
        assert torch.equal(gram * is_written_twice, gram.mT * is_written_twice)


def test_polynomial_and_product_of_symmetric_matrices() -> None:
    x = torch.randn(2, 200, 64) / 8
    r = x @ x.mT
    z = symmetric.launch(r, r, r, False, 2.0, -1.5, 3.0)
    expected = 2.0 * r @ r - 1.5 * r + 3.0 * torch.eye(200)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        symmetric.launch(z, r, None, False, 1.0, 0.0, 0.0), expected @ r, rtol=1e-4, atol=1e-3
    )


def test_multiply_by_one_factor_per_matrix() -> None:
    x, factors = torch.randn(3, 50, 70), torch.rand(3)
    expected = x * factors[:, None, None]
    torch.testing.assert_close(elementwise.launch_multiply(x, factors, torch.float32), expected)
    torch.testing.assert_close(elementwise.launch_multiply(x, factors, torch.float16), expected.half())


def random_tensors(num_tensors: int, shape: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(num_tensors)]


@pytest.mark.parametrize("shape", [(40, 64), (7, 13), (0, 5)])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_momentum_and_parameter_update(
    shape: tuple[int, int], nesterov: bool, found_inf: float | None
) -> None:
    gradients, momenta, params = (random_tensors(3, shape) for _ in range(3))
    mask = None if found_inf is None else torch.tensor(found_inf)
    copies = [x.clone() for x in momenta], [x.clone() for x in params]
    expected = elementwise.update_momentum(
        gradients, copies[0], weight=0.1, nesterov=nesterov, dtype=torch.float32, found_inf=mask
    )
    actual = elementwise.launch_update_momentum(gradients, momenta, 0.1, nesterov, torch.float32, mask)
    torch.testing.assert_close((actual, momenta), (expected, copies[0]))
    elementwise.apply_update(copies[1], expected, decay=0.9, alpha=-0.3, found_inf=mask)
    elementwise.launch_apply_update(params, actual, 0.9, -0.3, mask)
    torch.testing.assert_close(params, copies[1])
