"""The chunked loss equals the loss of materialized logits."""

import pytest
import torch
from torch.nn import functional as F

from models.loss import (
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_with_z_loss,
    linear_token_losses,
)
from tokens import IGNORE_INDEX


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 15, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(33, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 33, (2, 15), generator=generator)
    labels[0, 3:9] = IGNORE_INDEX
    loss = linear_cross_entropy(x, weight, labels, chunk_tokens)
    expected = cross_entropy(x @ weight.T, labels)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss / 7, (x, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected / 7, (x, weight)))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
def test_z_loss_and_its_gradients_equal_those_of_autograd(z_loss: float, chunk_tokens: int) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = 3 * torch.randn(2, 15, 8, dtype=torch.float64, generator=generator)
        weight = torch.randn(33, 8, dtype=torch.float64, generator=generator)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        labels = torch.randint(0, 33, (2, 15), generator=generator)
        labels[torch.rand(2, 15, generator=generator) < 0.3] = IGNORE_INDEX
        loss, z = linear_cross_entropy_with_z_loss(x, weight, labels, z_loss, chunk_tokens)
        normalizers = (x @ weight.T).logsumexp(-1)[labels != IGNORE_INDEX]
        expected_z = z_loss * (normalizers**2).sum()
        expected = cross_entropy(x @ weight.T, labels) + expected_z
        torch.testing.assert_close(z, expected_z.detach())
        torch.testing.assert_close(loss, expected)
        assert loss.requires_grad
        assert not z.requires_grad
        gradients = torch.autograd.grad(loss / 7, leaves)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected / 7, leaves))


def test_z_loss_in_bfloat16_is_within_the_error_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 32, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(100, 32, generator=generator) / 5).bfloat16().requires_grad_()
    labels = torch.randint(0, 100, (1, 64), generator=generator)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = x @ weight.T
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return cross_entropy(logits, labels) + 0.1 * (wide.logsumexp(-1) ** 2).sum()

    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = torch.autograd.grad(plain(*wide), wide)
    loss, _ = linear_cross_entropy_with_z_loss(x, weight, labels, 0.1, 16)
    ours, theirs = torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(plain(x, weight), (x, weight))
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert (a.double() - t).norm() <= 2 * (b.double() - t).norm() + 1e-3 * t.norm()


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
def test_losses_of_tokens_equal_the_plain_ones_and_add_up_to_the_training_loss(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 15, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(33, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 33, (2, 15), generator=generator)
    labels[0, 3:9] = IGNORE_INDEX
    losses = linear_token_losses(x, weight, labels, chunk_tokens)
    expected = F.cross_entropy((x @ weight.T).mT, labels, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(losses.sum(), linear_cross_entropy(x, weight, labels))


def test_only_ignored_labels_give_zero() -> None:
    x = torch.randn(1, 4, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.full((1, 4), IGNORE_INDEX))
    loss.backward()
    assert loss == 0
    for gradient in (x.grad, weight.grad):
        assert gradient is not None
        assert not gradient.any()


def test_an_invalid_label_raises_as_in_torch() -> None:
    x, weight = torch.randn(1, 4, 8), torch.randn(5, 8)
    for wrong in (-1, 5):
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(x, weight, torch.tensor([[0, wrong, 2, IGNORE_INDEX]]))


def test_a_second_derivative_raises() -> None:
    x, weight = torch.randn(1, 4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_autocast_casts_hidden_states_and_weight() -> None:
    x, weight = torch.randn(1, 9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    labels = torch.arange(9)[None] % 5
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels, 4)
    expected = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), labels, 4)
    assert torch.equal(loss, expected)
    gradients = zip(*(torch.autograd.grad(y, (x, weight)) for y in (loss, expected)), strict=True)
    assert all(torch.equal(actual, wanted) and actual.dtype == x.dtype for actual, wanted in gradients)


def test_loss_on_the_meta_device() -> None:
    x, weight = torch.empty(1, 4, 8, device="meta", requires_grad=True), torch.empty(5, 8, device="meta")
    loss = linear_cross_entropy(x, weight, torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    loss.backward()
    assert (loss.is_meta, loss.shape, loss.dtype) == (True, (), torch.float32)
    assert x.grad is not None
    assert (x.grad.is_meta, x.grad.shape) == (True, x.shape)


def test_bfloat16_gradients_are_within_the_error_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 32, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(100, 32, generator=generator) / 5).bfloat16().requires_grad_()
    labels = torch.randint(0, 100, (1, 64), generator=generator)

    def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [g.double() for g in torch.autograd.grad(loss, inputs)]

    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = gradients(cross_entropy(wide[0] @ wide[1].T, labels), *wide)
    ours = gradients(linear_cross_entropy(x, weight, labels, 16), x, weight)
    plain = gradients(cross_entropy(x @ weight.T, labels), x, weight)
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert (a - t).norm() <= 2 * (b - t).norm() + 1e-3 * t.norm()


def low_precision_loss(
    num_tokens: int, chunk_tokens: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return a loss in bf16, its leaves, and the labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, num_tokens, 32, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(100, 32, generator=generator) / 5).bfloat16().requires_grad_()
    labels = torch.randint(0, 100, (1, num_tokens), generator=generator)
    return linear_cross_entropy(x, weight, labels, chunk_tokens), [x, weight], labels


def test_the_incoming_gradient_is_not_rounded_to_the_weights_dtype() -> None:
    # 1 / 7 in bf16 is off by 2e-3, for all gradients alike
    loss, leaves, _ = low_precision_loss(512, 64)
    whole, seventh = (torch.autograd.grad(y, leaves, retain_graph=True) for y in (loss, loss / 7))
    for a, b in zip(whole, seventh, strict=True):
        a, b = a.double().flatten(), 7 * b.double().flatten()
        assert float(a @ b / (a @ a)) == pytest.approx(1.0, abs=5e-4)


def test_the_weights_gradient_is_summed_over_chunks_in_fp32() -> None:
    errors = []
    for chunk_tokens in (1, 4096):
        loss, leaves, labels = low_precision_loss(4096, chunk_tokens)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        truth = torch.autograd.grad(cross_entropy(wide[0] @ wide[1].T, labels), wide[1])[0]
        actual = torch.autograd.grad(loss, leaves[1])[0].double()
        errors.append(float((actual - truth).norm() / truth.norm()))
    # in bf16 the sum of 4096 terms is off by 0.08
    assert errors[0] < 2 * errors[1] < 0.01


def test_the_softmax_of_bfloat16_logits_is_computed_in_fp32() -> None:
    loss, (x, weight), labels = low_precision_loss(256, 64)
    logits = x @ weight.T
    expected = F.cross_entropy(logits[0].float(), labels[0], reduction="none")
    torch.testing.assert_close(linear_token_losses(x, weight, labels, 64)[0], expected)
    torch.testing.assert_close(loss, expected.sum())
    (dx,) = torch.autograd.grad(loss, x)
    dlogits = logits[0].float().softmax(-1) - F.one_hot(labels[0], 100)
    torch.testing.assert_close(dx[0], dlogits.bfloat16() @ weight)
