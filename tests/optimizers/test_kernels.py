from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optimizers.kernels import elementwise
from optimizers.kernels.symmetric import symmetric_product
from tests.interpreter import run_interpreted

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_in_interpreter() -> None:
    run_interpreted(INTERPRETED)


def test_a_batch_of_any_number_of_matrices_fits_into_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    # blocks of one row: the second axis of a grid ends at 65,535
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(elementwise, "_multiply_kernel", Kernel())
    x = torch.empty(70_000, 1, 2 * elementwise._BLOCK + 1, dtype=torch.float16)
    elementwise.launch_multiply(x, torch.ones(len(x)), torch.float16)
    assert grids == [(3 * len(x),)]


@pytest.mark.gpu
def test_blocks_of_one_row_on_gpu() -> None:
    x = torch.ones(70_000, 1, 8, device="cuda")
    factors = torch.arange(70_000, device="cuda").float()
    assert torch.equal(elementwise.multiply(x, factors, torch.float32), factors[:, None, None].expand_as(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# 201 is not a multiple of 8: no tensor descriptors
@pytest.mark.parametrize(("m", "k"), [(1024, 3072), (200, 136), (201, 1000), (2048, 512)])
@pytest.mark.parametrize("is_tall", [False, True])
def test_symmetric_products_on_gpu(dtype: torch.dtype, m: int, k: int, is_tall: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(3, m, k, generator=generator, device="cuda") / k**0.5).to(dtype)
    stored = x.mT.contiguous() if is_tall else x
    r = symmetric_product(stored, stored, is_tall=is_tall)
    expected = x.double() @ x.double().mT
    rounding = torch.finfo(dtype).eps
    assert ((r - expected).norm() / expected.norm()).item() < rounding
    assert torch.equal(r, r.mT)
    z = symmetric_product(r, r, alpha=0.5, c=r, beta=-1.5, diagonal=3.0)
    expected = 0.5 * r.double() @ r.double() - 1.5 * r.double() + 3.0 * torch.eye(m, device="cuda")
    assert ((z - expected).norm() / expected.norm()).item() < rounding
