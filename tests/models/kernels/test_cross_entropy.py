from pathlib import Path

import pytest
import torch

from models.kernels import cross_entropy
from models.loss import linear_cross_entropy_with_z_loss
from parallax.testing import assert_within_budget, relative_error
from tests.interpreter import run_interpreted
from tests.models.kernels.cross_entropy_cases import CASES, make, plain, truth
from tokens import IGNORE_INDEX

INTERPRETED = Path(__file__).with_name("interpreted_cross_entropy.py")


def test_kernel_in_interpreter() -> None:
    run_interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_columns", [*CASES, 16384, 151_936])
def test_losses_and_gradient_are_within_the_budget_on_gpu(
    num_columns: int, dtype: torch.dtype, z_loss: float
) -> None:
    logits, labels = make(num_columns, dtype, "cuda")
    assert cross_entropy.serves(logits)
    expected, yardstick = truth(logits, labels, z_loss), plain(logits, labels, z_loss)
    losses = cross_entropy.cross_entropy_(logits, labels, z_loss, needs_grad=True)
    assert_within_budget("losses", losses, expected[0], yardstick[0], torch.float32)
    assert_within_budget("gradient", logits, expected[1], yardstick[1], dtype)


@pytest.mark.gpu
def test_the_weights_gradient_is_not_rounded_between_chunks_on_gpu() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, 4096, 256, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(4096, 256, device="cuda", generator=generator).div(16).bfloat16().requires_grad_()
    labels = torch.randint(0, 4096, (1, 4096), device="cuda", generator=generator)
    labels[0, 1000:1100] = IGNORE_INDEX
    results = []
    for chunk_tokens in (4096, 100):
        loss, z = linear_cross_entropy_with_z_loss(x, weight, labels, 1e-4, chunk_tokens)
        results.append([loss, z, *torch.autograd.grad(loss, (x, weight))])
    wide = [each.detach().double().requires_grad_() for each in (x, weight)]
    logits = wide[0][0] @ wide[1].T
    lse = logits.logsumexp(-1)
    is_valid = labels[0] != IGNORE_INDEX
    target = logits.gather(1, torch.where(is_valid, labels[0], 0)[:, None])[:, 0]
    total = ((lse - target + 1e-4 * lse.square()) * is_valid).sum()
    expected = torch.autograd.grad(total, wide)
    assert relative_error(results[0][0], total.detach()) < 1e-4
    for one, many, wanted in zip(results[0][2:], results[1][2:], expected, strict=True):
        assert relative_error(one, wanted) < 6e-3
        assert relative_error(many, wanted) < 1.05 * relative_error(one, wanted) + 1e-5
    loss, _ = linear_cross_entropy_with_z_loss(x, weight, labels, 1e-4, 4096)
    # 1 / 7 in bf16 is off by 2e-3, for all gradients alike
    for seventh, one in zip(torch.autograd.grad(loss / 7, (x, weight)), results[0][2:], strict=True):
        a, b = one.double().flatten(), 7 * seventh.double().flatten()
        assert float(a @ b / (a @ a)) == pytest.approx(1.0, abs=5e-4)
    again = linear_cross_entropy_with_z_loss(x, weight, labels, 1e-4, 4096)[0]
    assert torch.equal(again, results[0][0])
