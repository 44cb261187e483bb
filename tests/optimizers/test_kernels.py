from pathlib import Path

import pytest
import torch

from optimizers.kernels.symmetric import symmetric_product
from tests.interpreter import run_interpreted

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_in_interpreter() -> None:
    run_interpreted(INTERPRETED)


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
