"""Held-out loss of a model in training: token-weighted nats/token, with its standard error over documents."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from data.loading.held_out import HeldOutBatch
from data.progress import Progress
from errors import UserError
from eval.distributed import all_reduce
from eval.standard_error import ratio_standard_error
from tokens import IGNORE_INDEX


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of a model on held-out text.

    Attributes:
        loss: Mean negative log-likelihood in nats/token over all predicted tokens.
        standard_error: Standard error of the loss over documents in nats/token; None for a single document.
            That of the difference of two models on the same documents is smaller.
        num_tokens: Number of predicted tokens.
        num_documents: Number of documents with a predicted token.
        num_cut_documents: Documents that do not fit into one row: the rest is predicted without the
            beginning.
        unigram_entropy: Entropy in nats/token of the frequencies of the predicted tokens: the loss of the
            best model without context.
    """

    loss: float
    standard_error: float | None
    num_tokens: int
    num_documents: int
    num_cut_documents: int
    unigram_entropy: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity(self.loss)

    @property
    def counts(self) -> str:
        """The tokens and documents behind the loss, in words."""
        cut = f", {self.num_cut_documents:,} cut into rows" if self.num_cut_documents else ""
        return f"{self.num_tokens:,} tokens of {self.num_documents:,} documents{cut}"

    def __str__(self) -> str:
        return f"{format_loss(self.loss, self.standard_error)}, perplexity {self.perplexity:.2f}"


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def format_loss(loss: float, standard_error: float | None) -> str:
    """Format a loss, with its standard error where there is one."""
    error = "" if standard_error is None else f" +/- {standard_error:.4f}"
    return f"{loss:.4f}{error} nats/token"


class _Sums:
    """Sums over predicted tokens, on the device: by document, and by token id.

    Args:
        vocab_size: Number of ids V.
        device: Device of the sums.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._nats = torch.zeros(1, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self._id_counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)

    def add(
        self, losses: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor, num_documents: int
    ) -> None:
        """Add the tokens of a batch; nothing waits for the device.

        Args:
            losses: Loss of each label in nats, 0 for IGNORE_INDEX.
            labels: Token ids, of the same shape.
            documents: Number of each label's document, of the same shape.
            num_documents: More than the largest of them, the same on all ranks.
        """
        while len(self._nats) < num_documents:
            self._nats = torch.cat((self._nats, torch.zeros_like(self._nats)))
            self._tokens = torch.cat((self._tokens, torch.zeros_like(self._tokens)))
        ids, numbers = labels.flatten(), documents.flatten()
        valid = (ids != IGNORE_INDEX).to(torch.int64)
        self._nats.index_add_(0, numbers, losses.flatten().double())
        self._tokens.index_add_(0, numbers, valid)
        self._id_counts.index_add_(0, ids.clamp(min=0), valid)

    def result(self, num_cut_documents: int) -> HeldOutLoss:
        """Sum over all ranks; a collective.

        Args:
            num_cut_documents: Documents that do not fit into one row, the same on all ranks.

        Raises:
            UserError: There is no token to predict.
        """
        nats, tokens, counts = map(all_reduce, (self._nats, self._tokens, self._id_counts))
        num_tokens = int(tokens.sum())
        if num_tokens == 0:
            raise UserError("the held-out text has no token to predict; give data.validation a longer text")
        frequencies = counts[counts > 0].double() / num_tokens
        return HeldOutLoss(
            loss=float(nats.sum()) / num_tokens,
            standard_error=ratio_standard_error(nats, tokens),
            num_tokens=num_tokens,
            num_documents=int((tokens > 0).sum()),
            num_cut_documents=num_cut_documents,
            unigram_entropy=-float((frequencies * frequencies.log()).sum()),
        )


@torch.no_grad()
def held_out_loss(
    model: nn.Module | Callable[..., torch.Tensor],
    batches: Iterable[HeldOutBatch],
    *,
    vocab_size: int,
    max_seqlen: int,
    device: torch.device,
    progress: Progress | None = None,
) -> HeldOutLoss:
    """Compute the loss over the batches of all ranks, each token weighted equally.

    A document whose tokens are in several rows, on one rank or on several, counts as one.

    Args:
        model: `model(tokens, cu_seqlens=, max_seqlen=, labels_BT=, reduction="none")` returns the loss of
            each label in nats.
        batches: This rank's, equally many on all ranks.
        vocab_size: Number of ids V.
        max_seqlen: Upper bound of the length of a document.
        device: The model's device.
        progress: Told how much of the documents is done.

    Raises:
        UserError: There is no token to predict.
    """
    sums = _Sums(vocab_size, device)
    num_cut = 0
    for batch in batches:
        num_cut = batch.num_cut_documents
        labels = batch.labels.to(device, non_blocking=True)
        cu_seqlens = batch.inputs.get("cu_seqlens")
        losses = model(
            batch.inputs["input"].to(device, non_blocking=True),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device, non_blocking=True),
            max_seqlen=max_seqlen,
            labels_BT=labels,
            reduction="none",
        )
        sums.add(losses, labels, batch.documents.to(device, non_blocking=True), batch.num_documents)
        if progress is not None:
            progress.update(batch.fraction)
    return sums.result(num_cut)
