"""A causal language model of the transformers library behind the interface of LanguageModel."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from errors import UnsupportedError
from eval.scoring.groups import Group, Scores, rows_of
from eval.scoring.head_scores import ScoredTokens, TokenScorer, head_input_hook
from eval.scoring.language_model import LanguageModel


class TransformersModel(LanguageModel):
    """A causal language model of the transformers library, in rows padded on the right.

    Args:
        model: A `PreTrainedModel` with a language-modeling head.
        max_length: Most tokens of an input.
        identity: As in LanguageModel.
    """

    is_padded = True

    def __init__(self, model: Any, *, max_length: int, identity: str = "") -> None:
        self._model = model
        self.max_length = max_length
        self.identity = identity

    def row_lengths(self, group: Group) -> list[int]:
        """See LanguageModel."""
        return [len(group.context) + len(tail) for tail in rows_of(group).tails]

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        """See LanguageModel."""
        lengths = [self.row_lengths(group) for group in groups]
        longest = max(map(max, lengths))
        tokens = torch.zeros(sum(map(len, lengths)), longest, dtype=torch.int64)
        scored = ScoredTokens([], [])
        first = 0
        for group in groups:
            rows = rows_of(group)
            for row, tail in enumerate(rows.tails, first):
                tokens[row, : len(group.context) + len(tail)] = torch.tensor(group.context + tail)
            for continuation, row in zip(group.continuations, rows.row_of, strict=True):
                scored.add((first + row) * longest + len(group.context) - 1, continuation)
            first += len(rows.tails)
        scorer = TokenScorer(scored, self._model.device)

        def select(head: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
            # the model's own steps after the head, such as scaling its logits, still apply
            return (args[0].flatten(0, 1)[scorer.positions].unsqueeze(0),)

        with head_input_hook(self._model.get_output_embeddings(), select):
            # causal attention never sees the padding on the right: no mask is needed
            logits_1PV = self._model(input_ids=tokens.to(self._model.device), use_cache=False).logits
        scorer.score(lambda chunk: logits_1PV[0, chunk])
        return scored.split(groups, *scorer.result())

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """Raise: generation is not supported for models of transformers.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "a transformers model does not generate here; evaluate such tasks with the harness's own HFLM"
        )
