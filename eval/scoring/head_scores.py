"""Log-probabilities of chosen tokens at chosen positions, without the logits of all.

Only positions that a continuation is read from reach the head, and they do in chunks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from eval.scoring.groups import Group, Scores, Tokens
from models.loss import CHUNK_TOKENS


class Layout(NamedTuple):
    """Where in a batch every scored token is read: by group, continuation and token, all in one order."""

    positions: list[int]
    targets: list[int]

    def add(self, start: int, continuation: Tokens) -> None:
        """Add the continuation whose first token is read at position start, the others behind it."""
        self.positions.extend(range(start, start + len(continuation)))
        self.targets.extend(continuation)

    def scores(
        self, groups: Sequence[Group], log_probs: list[float], greedy: list[bool]
    ) -> list[list[Scores]]:
        """Values in the layout's order as scores of the groups that it was made of."""
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
    """Log-probabilities and greedy flags of targets `[M]`, each read at row index `[M]` of the logits."""
    wide = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
    log_probs = wide[index, targets] - wide.logsumexp(-1)[index]
    return log_probs, wide.argmax(-1)[index] == targets


def head_logits(x_PD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Logits `[P, V]`: in fp32 where 16-bit ones can be had so."""
    if x_PD.is_cuda and x_PD.dtype == weight_VD.dtype == torch.bfloat16:
        # 16-bit logits would be off by 0.03, which decides between answers that are almost as likely.
        return torch.mm(x_PD, weight_VD.T, out_dtype=torch.float32)
    return F.linear(x_PD, weight_VD)


class Reader:
    """Scores the tokens of a layout, each position's logits once.

    Attributes:
        positions: Those that logits are needed of, `[P]` int64, ascending, on the device.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Find out which positions are needed.

        Args:
            layout: Of at least one token.
            device: Where logits will be.
        """
        positions, inverse = torch.tensor(layout.positions).unique(return_inverse=True)
        order = inverse.argsort(stable=True)
        self.positions = positions.to(device)
        self._inverse, self._order = inverse[order], order
        self._targets = torch.tensor(layout.targets)[order].to(device)
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read(self, logits: Callable[[slice], torch.Tensor]) -> None:
        """Score everything; logits(rows) gives those of some of the positions, `[P, V]`."""
        for first in range(0, len(self.positions), CHUNK_TOKENS):
            rows = slice(first, first + CHUNK_TOKENS)
            begin, end = torch.searchsorted(self._inverse, torch.tensor([rows.start, rows.stop])).tolist()
            index = (self._inverse[begin:end] - first).to(self._targets.device)
            self._parts.append(_chunk_scores(logits(rows), index, self._targets[begin:end]))

    def result(self) -> tuple[list[float], list[bool]]:
        """What was read, in the layout's order."""
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(back))
        log_probs, greedy = (torch.cat(part).cpu()[back] for part in zip(*self._parts, strict=True))
        return log_probs.tolist(), greedy.tolist()


@contextmanager
def before(head: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], object]) -> Iterator[None]:
    """Let a hook see, and replace, what goes into the head: sharded weights are whole only in there."""
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
