"""A causal language model as evaluation sees it: how likely continuations are, and how a text goes on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from eval.scoring.groups import Group, Scores, rows_of
from eval.scoring.head_scores import Layout, Reader, before, head_logits
from eval.scoring.shared_prefix import score_shared, shared_length
from models.attention.base import Attention
from models.attention.key_values import KeyValueAttention
from models.generation.generate import generate
from models.qwen3 import Qwen3


class LanguageModel(ABC):
    """A causal language model: tokens in, log-probabilities out.

    Attributes:
        max_length: Most tokens that it takes as input at once.
        identity: What weights these are; saved results are used again only for an equal one, "" for never.
        is_padded: Whether rows of a batch are padded to the longest, or take no more than they hold.
    """

    max_length: int
    identity: str
    is_padded: bool

    @abstractmethod
    def row_lengths(self, group: Group) -> list[int]:
        """Tokens of each row that scoring a group puts through the model."""

    @abstractmethod
    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        """Score one batch.

        Args:
            groups: Whose context and continuation together have at most max_length + 1 tokens.

        Returns:
            Scores of every group's continuations, in order.
        """

    @abstractmethod
    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """Continue prompts greedily.

        Args:
            prompts: Token ids of each, at least one.
            max_new_tokens: Most tokens of a continuation.
            stop_ids: Tokens that end a continuation; they belong to it.
            stop: Given a prompt's index and its continuation so far, whether that ends here.

        Returns:
            The continuations.
        """


class Qwen3Model(LanguageModel):
    """One of our models. Rows are packed documents, so that nothing is spent on padding.

    Where the attention keeps keys and values, a context that several continuations share is read once
    (eval/scoring/shared_prefix.py).
    """

    is_padded = False

    def __init__(self, model: Qwen3, *, max_length: int, identity: str = "") -> None:
        """Wrap a model.

        Args:
            model: On its device, in the dtype to compute in; may be sharded by FSDP2 or compiled.
            max_length: Most tokens to give it as input at once: the length of its training rows.
            identity: As LanguageModel.
        """
        self._model = model
        self.max_length = max_length
        self.identity = identity
        weights = list(model.parameters())
        self._device = weights[0].device
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        self._has_keys = all(isinstance(each, KeyValueAttention) for each in attentions) and not any(
            isinstance(weight, DTensor) for weight in weights
        )

    def row_lengths(self, group: Group) -> list[int]:
        """See LanguageModel."""
        rows = rows_of(group)
        padded = shared_length(group, rows) if self._can_share() else None
        if padded is None:
            return [len(group.context) + len(tail) for tail in rows.tails]
        return [len(group.context), *(padded for _ in rows.tails)]

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        """See LanguageModel."""
        can_share = self._can_share()
        shared = [can_share and shared_length(group, rows_of(group)) is not None for group in groups]
        alone = iter(
            self._score_rows(
                [group for group, is_shared in zip(groups, shared, strict=True) if not is_shared]
            )
        )
        together = iter(
            score_shared(
                self._model, [group for group, is_shared in zip(groups, shared, strict=True) if is_shared]
            )
        )
        return [next(together) if is_shared else next(alone) for is_shared in shared]

    def _can_share(self) -> bool:
        """Whether contexts may be read apart from what follows them.

        Sharded weights are whole in a forward only; what goes through a cache is computed in the weights'
        dtype, a forward in autocast's.
        """
        return self._has_keys and not torch.is_autocast_enabled(self._device.type)

    def _score_rows(self, groups: Sequence[Group]) -> list[list[Scores]]:
        """Score groups by one forward over all of their rows."""
        if not groups:
            return []
        tokens: list[int] = []
        bounds = [0]
        layout = Layout([], [])
        for group in groups:
            rows = rows_of(group)
            starts: list[int] = []
            for tail in rows.tails:
                starts.append(len(tokens) + len(group.context) - 1)
                tokens += group.context
                tokens += tail
                bounds.append(len(tokens))
            for continuation, row in zip(group.continuations, rows.row_of, strict=True):
                layout.add(starts[row], continuation)
        reader = Reader(layout, self._device)

        def read(head: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor, None]:
            (x_BTD, _) = args
            x_PD, weight = x_BTD[0, reader.positions], head.weight
            assert isinstance(weight, torch.Tensor)
            reader.read(lambda part: head_logits(x_PD[part], weight))
            return x_BTD[:, :1], None

        with before(self._model.output, read):
            self._model(
                torch.tensor([tokens], device=self._device),
                cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=self._device),
                max_seqlen=max(last - first for first, last in pairwise(bounds)),
            )
        return layout.scores(groups, *reader.result())

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """See LanguageModel."""
        results = generate(
            self._model,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            stop=stop,
            batch_size=len(prompts),
        )
        return [result.tokens for result in results]
