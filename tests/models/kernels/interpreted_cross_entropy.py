"""The kernel of the loss in Triton's interpreter; test_cross_entropy.py runs this file."""

import os

import pytest
import torch
from torch import Tensor

from models import loss
from models.kernels import cross_entropy
from parallax.testing import assert_within_budget
from tests.models.kernels.cross_entropy_cases import CASES, make, plain, truth
from tokens import IGNORE_INDEX

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_cross_entropy.py"


@pytest.fixture(autouse=True)
def small_tiles_and_uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(cross_entropy, "_BLOCK", 512)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("num_columns", CASES)
def test_losses_and_gradient_are_within_the_budget(num_columns: int, z_loss: float) -> None:
    logits, labels = make(num_columns, torch.float16, "cpu")
    expected, yardstick = truth(logits, labels, z_loss), plain(logits, labels, z_loss)
    unchanged = logits.clone()
    losses = cross_entropy.cross_entropy_(logits, labels, z_loss, needs_grad=False)
    assert torch.equal(logits, unchanged)
    again = cross_entropy.cross_entropy_(logits, labels, z_loss, needs_grad=True)
    assert torch.equal(losses, again)
    assert_within_budget("losses", losses, expected[0], yardstick[0], torch.float32)
    assert_within_budget("gradient", logits, expected[1], yardstick[1], torch.float16)
    is_ignored = labels == IGNORE_INDEX
    assert not losses[is_ignored].any()
    assert not logits[is_ignored].any()


@pytest.mark.parametrize("wrong", [-1, 40])
def test_the_loss_of_a_label_that_is_no_column_is_nan(wrong: int) -> None:
    losses = cross_entropy.cross_entropy_(
        torch.randn(2, 40).half(), torch.tensor([3, wrong]), 0.0, needs_grad=True
    )
    assert losses[:, 0].isnan().tolist() == [False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_its_own_token_alone(value: float) -> None:
    logits = torch.randn(3, 1100).half()
    logits[1, 1050] = value
    logits[2, 700] = value
    labels = torch.tensor([3, 4, IGNORE_INDEX])
    losses = cross_entropy.cross_entropy_(logits, labels, 0.0, needs_grad=True)
    assert losses[:, 0].isfinite().tolist() == [True, False, True]
    assert logits.isfinite().all(1).tolist() == [True, False, True]


def test_the_whole_loss_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20, 16, generator=generator).half().requires_grad_()
    weight = (torch.randn(600, 16, generator=generator) / 4).half().requires_grad_()
    labels = torch.randint(0, 600, (1, 20), generator=generator)
    labels[0, 5:9] = IGNORE_INDEX

    def results() -> list[Tensor]:
        total, z = loss.linear_cross_entropy_with_z_loss(x, weight, labels, 1e-3, 7)
        return [total, z, *torch.autograd.grad(total, (x, weight))]

    expected = results()
    monkeypatch.setattr(cross_entropy, "serves", lambda logits: True)
    for actual, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=2e-4)


def test_no_tokens() -> None:
    losses = cross_entropy.cross_entropy_(
        torch.zeros(0, 40).half(), torch.zeros(0, dtype=torch.int64), 0.0, needs_grad=True
    )
    assert losses.shape == (0, 2)
