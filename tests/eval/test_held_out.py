"""Held-out loss: every token has the same weight, whatever the sizes of batches."""

import math
from typing import Any

import pytest
import torch

from eval.held_out import held_out_loss
from tokens import IGNORE_INDEX

CPU = torch.device("cpu")


def summed_loss(tokens: torch.Tensor, *, labels_BT: torch.Tensor, **_: object) -> torch.Tensor:
    """Return the sum of the labels: a model whose loss at a position is the label's id."""
    return labels_BT[labels_BT != IGNORE_INDEX].sum().float()


def batch(labels: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows = torch.tensor([labels])
    return {"input": rows.clone()}, rows


def test_tokens_have_equal_weight_over_batches_of_different_sizes() -> None:
    batches = [batch([1, 1, 1]), batch([5]), batch([IGNORE_INDEX, 2])]
    result = held_out_loss(summed_loss, batches, vocab_size=9, max_seqlen=3, device=CPU)
    assert result.num_tokens == 5
    assert result.loss == pytest.approx(10 / 5)
    assert result.perplexity == pytest.approx(math.exp(2))
    expected = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    assert result.unigram_entropy == pytest.approx(expected)


def test_document_boundaries_are_passed_to_the_model() -> None:
    received: list[dict[str, Any]] = []

    def model(tokens: torch.Tensor, **given: Any) -> torch.Tensor:
        received.append(given)
        return torch.zeros(())

    inputs, labels = batch([1, 2])
    inputs["cu_seqlens"] = torch.tensor([0, 1, 2], dtype=torch.int32)
    held_out_loss(model, [(inputs, labels)], vocab_size=3, max_seqlen=2, device=CPU)
    assert received[0]["max_seqlen"] == 2
    assert torch.equal(received[0]["cu_seqlens"], inputs["cu_seqlens"])


def test_a_huge_loss_has_infinite_perplexity_and_a_text_without_tokens_is_an_error() -> None:
    result = held_out_loss(summed_loss, [batch([800])], vocab_size=801, max_seqlen=1, device=CPU)
    assert result.perplexity == math.inf
    with pytest.raises(ValueError, match="no token to predict"):
        held_out_loss(summed_loss, [batch([IGNORE_INDEX])], vocab_size=3, max_seqlen=1, device=CPU)
