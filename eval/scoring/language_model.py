"""The interface of a causal language model in evaluation, and our models behind it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from eval.scoring.groups import Group, Scores, rows_of
from eval.scoring.head_scores import ScoredTokens, TokenScorer, head_input_hook
from eval.scoring.shared_prefix import score_shared, shared_length
from models.attention.key_values import KeyValueAttention
from models.generation.generate import generate
from models.qwen3 import Head, Qwen3


class LanguageModel(ABC):
    """A causal language model that scores and generates continuations.

    Attributes:
        max_length: Most tokens of an input.
        identity: Hash of the weights; saved results are reused only for an equal one. "" for never.
        is_padded: Whether rows of a batch are padded to the longest; otherwise they are packed.
    """

    max_length: int
    identity: str
    is_padded: bool

    @abstractmethod
    def row_lengths(self, group: Group) -> list[int]:
        """Return the number of tokens in each input row of a group."""

    @abstractmethod
    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        """Score one batch.

        Args:
            groups: Groups in which context and continuation have at most max_length + 1 tokens together.

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
            stop_ids: Tokens that end a continuation and belong to it.
            stop: Given a prompt's index and its continuation so far, returns whether it ends here.

        Returns:
            Token ids of the continuations.
        """


class Qwen3Model(LanguageModel):
    """A Qwen3 of ours. Rows are packed as documents, without padding.

    Where all attention layers have a KV cache, a context that several continuations share goes through the
    model once (eval/scoring/shared_prefix.py).

    Args:
        model: On its device, in the dtype to compute in; may be sharded by FSDP2 or compiled.
        max_length: Most tokens of an input: the length of the rows in training.
        identity: As in LanguageModel.
    """

    is_padded = False

    def __init__(self, model: Qwen3, *, max_length: int, identity: str = "") -> None:
        self._model = model
        self.max_length = max_length
        self.identity = identity
        weights = list(model.parameters())
        self._device = weights[0].device
        has_kv_cache = all(isinstance(module, KeyValueAttention) for module in model.attention_modules())
        # sharded weights are gathered in a forward of the whole model only
        self._can_extend = has_kv_cache and not any(isinstance(weight, DTensor) for weight in weights)

    @property
    def qwen3(self) -> Qwen3:
        """The model itself."""
        return self._model

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
        is_shared = [can_share and shared_length(group, rows_of(group)) is not None for group in groups]
        shared = [group for group, flag in zip(groups, is_shared, strict=True) if flag]
        whole = [group for group, flag in zip(groups, is_shared, strict=True) if not flag]
        shared_scores, whole_scores = iter(score_shared(self._model, shared)), iter(self._score_rows(whole))
        return [next(shared_scores if flag else whole_scores) for flag in is_shared]

    def _can_share(self) -> bool:
        """Return whether contexts may go through the KV cache.

        The cache is computed in the weights' dtype, not in autocast's.
        """
        return self._can_extend and not torch.is_autocast_enabled(self._device.type)

    def _score_rows(self, groups: Sequence[Group]) -> list[list[Scores]]:
        """Score groups by one forward over all of their rows, packed."""
        if not groups:
            return []
        tokens: list[int] = []
        bounds = [0]
        scored = ScoredTokens([], [])
        for group in groups:
            rows = rows_of(group)
            starts: list[int] = []
            for tail in rows.tails:
                starts.append(len(tokens) + len(group.context) - 1)
                tokens += group.context
                tokens += tail
                bounds.append(len(tokens))
            for continuation, row in zip(group.continuations, rows.row_of, strict=True):
                scored.add(starts[row], continuation)
        scorer = TokenScorer(scored, self._device)

        def score(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x_BTD, *others = args
            assert isinstance(head, Head)
            x_PD = x_BTD[0, scorer.positions]
            scorer.score(lambda chunk: head.logits(x_PD[chunk]))
            # the head itself computes the logits of one position only
            return (x_BTD[:, :1], *others)

        with head_input_hook(self._model.output, score):
            self._model(
                torch.tensor([tokens], device=self._device),
                cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=self._device),
                max_seqlen=max(last - first for first, last in pairwise(bounds)),
            )
        return scored.split(groups, *scorer.result())

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
