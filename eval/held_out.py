"""Held-out loss of a model in training: token-weighted nats/token and perplexity."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from tokens import IGNORE_INDEX

Batch = tuple[Mapping[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeldOutLoss:
    """What a model makes of a text.

    Attributes:
        loss: Mean negative log-likelihood in nats/token over all predicted tokens.
        num_tokens: Tokens that were predicted.
        unigram_entropy: Entropy in nats/token of those tokens' own frequencies: the loss of the best model
            without context.
    """

    loss: float
    num_tokens: int
    unigram_entropy: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def _all_reduce(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


@torch.no_grad()
def held_out_loss(
    model: nn.Module | Callable[..., torch.Tensor],
    batches: Iterable[Batch],
    *,
    vocab_size: int,
    max_seqlen: int,
    device: torch.device,
) -> HeldOutLoss:
    """Evaluate a model on this rank's batches and sum over ranks.

    Args:
        model: `model(tokens, cu_seqlens=, max_seqlen=, labels_BT=)` gives the summed loss in nats.
        batches: ({"input": ids, optionally "cu_seqlens": bounds}, labels), as many on every rank.
        vocab_size: Number of ids V.
        max_seqlen: An upper bound on the length of a document.
        device: Where the model lies.

    Returns:
        Sums over all ranks, so that every token weighs the same.

    Raises:
        ValueError: There is no token to predict.
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
    loss_sum, counts = _all_reduce(loss_sum), _all_reduce(counts)
    num_tokens = int(counts.sum())
    if num_tokens == 0:
        raise ValueError("the held-out text has no token to predict; give data.validation a longer text")
    frequencies = counts[counts > 0].double() / num_tokens
    entropy = -(frequencies * frequencies.log()).sum()
    return HeldOutLoss(float(loss_sum) / num_tokens, num_tokens, float(entropy))
