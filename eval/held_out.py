"""Held-out loss of a model in training: token-weighted nats/token and perplexity."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from errors import UserError
from eval.distributed import all_reduce
from tokens import IGNORE_INDEX

Batch = tuple[Mapping[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of a model on held-out text.

    Attributes:
        loss: Mean negative log-likelihood in nats/token over all predicted tokens.
        num_tokens: Number of predicted tokens.
        unigram_entropy: Entropy in nats/token of the frequencies of the predicted tokens: the loss of the
            best model without context.
    """

    loss: float
    num_tokens: int
    unigram_entropy: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def held_out_loss(
    model: nn.Module | Callable[..., torch.Tensor],
    batches: Iterable[Batch],
    *,
    vocab_size: int,
    max_seqlen: int,
    device: torch.device,
) -> HeldOutLoss:
    """Compute the loss over the batches of all ranks, each token weighted equally.

    Args:
        model: `model(tokens, cu_seqlens=, max_seqlen=, labels_BT=)` returns the summed loss in nats.
        batches: This rank's: ({"input": ids, optionally "cu_seqlens": document boundaries}, labels), equally
            many on all ranks.
        vocab_size: Number of ids V.
        max_seqlen: Upper bound of the length of a document.
        device: The model's device.

    Raises:
        UserError: There is no token to predict.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)
    for inputs, labels in batches:
        labels = labels.to(device)
        cu_seqlens = inputs.get("cu_seqlens")
        loss = model(
            inputs["input"].to(device),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device),
            max_seqlen=max_seqlen,
            labels_BT=labels,
        )
        loss_sum += loss.double()
        counts += torch.bincount(labels[labels != IGNORE_INDEX], minlength=vocab_size)
    loss_sum, counts = all_reduce(loss_sum), all_reduce(counts)
    num_tokens = int(counts.sum())
    if num_tokens == 0:
        raise UserError("the held-out text has no token to predict; give data.validation a longer text")
    frequencies = counts[counts > 0].double() / num_tokens
    entropy = -(frequencies * frequencies.log()).sum()
    return HeldOutLoss(float(loss_sum) / num_tokens, num_tokens, float(entropy))
