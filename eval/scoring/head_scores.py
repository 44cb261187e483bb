"""Log-probabilities of chosen tokens at chosen positions, without the logits of all positions.

Only positions that predict a scored token reach the head, in chunks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from eval.scoring.groups import Group, Scores, Tokens

CHUNK_TOKENS = 4096
"""Positions per chunk: of 151,936 ids their fp32 logits take 2.5 GB."""


class ScoredTokens(NamedTuple):
    """The scored tokens of a batch, ordered by group, continuation and token.

    Attributes:
        positions: Position in the batch that predicts each token.
        targets: Id of each token.
    """

    positions: list[int]
    targets: list[int]

    def add(self, position: int, continuation: Tokens) -> None:
        """Add a continuation, its first token predicted at a position, the others at the following ones."""
        self.positions.extend(range(position, position + len(continuation)))
        self.targets.extend(continuation)

    def split(
        self, groups: Sequence[Group], log_probs: list[float], greedy: list[bool]
    ) -> list[list[Scores]]:
        """Split values of all tokens into scores of each group's continuations.

        Args:
            groups: The groups whose continuations were added, in the same order.
            log_probs: Log-probability of each token in nats.
            greedy: Whether each token is the most probable one.
        """
        scores: list[list[Scores]] = []
        first = 0
        for group in groups:
            scores.append([])
            for continuation in group.continuations:
                last = first + len(continuation)
                scores[-1].append(Scores(log_probs[first:last], greedy[first:last]))
                first = last
        return scores


def _chunk_scores(
    logits_PV: torch.Tensor, index: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score targets `[M]`, each predicted by row index `[M]` of the logits."""
    wide = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
    log_probs = wide[index, targets] - wide.logsumexp(-1)[index]
    return log_probs, wide.argmax(-1)[index] == targets


class TokenScorer:
    """Scores tokens from logits that are computed once per position.

    Args:
        tokens: The tokens to score, at least one.
        device: Device of the logits.

    Attributes:
        positions: Positions whose logits are needed, `[P]` int64, ascending, on the device.
    """

    def __init__(self, tokens: ScoredTokens, device: torch.device) -> None:
        positions, inverse = torch.tensor(tokens.positions).unique(return_inverse=True)
        order = inverse.argsort(stable=True)
        self.positions = positions.to(device)
        self._inverse, self._order = inverse[order], order
        self._targets = torch.tensor(tokens.targets)[order].to(device)
        self._chunks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def score(self, logits: Callable[[slice], torch.Tensor]) -> None:
        """Score all tokens, in chunks of positions.

        Args:
            logits: Given a slice of `positions`, computes their logits, `[P', V]`.
        """
        for first in range(0, len(self.positions), CHUNK_TOKENS):
            chunk = slice(first, first + CHUNK_TOKENS)
            begin, end = torch.searchsorted(self._inverse, torch.tensor([chunk.start, chunk.stop])).tolist()
            index = (self._inverse[begin:end] - first).to(self._targets.device)
            self._chunks.append(_chunk_scores(logits(chunk), index, self._targets[begin:end]))

    def result(self) -> tuple[list[float], list[bool]]:
        """Return log-probabilities and greedy flags in the order of the tokens."""
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(back))
        log_probs, greedy = (torch.cat(chunk).cpu()[back] for chunk in zip(*self._chunks, strict=True))
        return log_probs.tolist(), greedy.tolist()


@contextmanager
def head_input_hook(head: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], object]) -> Iterator[None]:
    """Register a forward pre-hook of the head; only there are the head's sharded weights gathered.

    Args:
        head: The output projection.
        hook: Given the head and its arguments, returns the arguments to use instead.
    """
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
