"""A causal language model of the transformers library behind the interface of our own."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from eval.scoring.groups import Group, Scores, rows_of
from eval.scoring.head_scores import Layout, Reader, before
from eval.scoring.language_model import LanguageModel


class TransformersModel(LanguageModel):
    """A causal language model of the transformers library, in rows padded on the right."""

    is_padded = True

    def __init__(self, model: Any, *, max_length: int, identity: str = "") -> None:
        """Wrap a model.

        Args:
            model: A `PreTrainedModel` with a language-modelling head.
            max_length: Most tokens to give it as input at once.
            identity: As LanguageModel.
        """
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
        layout = Layout([], [])
        first = 0
        for group in groups:
            rows = rows_of(group)
            for row, tail in enumerate(rows.tails, first):
                tokens[row, : len(group.context) + len(tail)] = torch.tensor(group.context + tail)
            for continuation, row in zip(group.continuations, rows.row_of, strict=True):
                layout.add((first + row) * longest + len(group.context) - 1, continuation)
            first += len(rows.tails)
        reader = Reader(layout, self._model.device)

        def keep(head: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
            # What the model does to its logits after the head, as scaling them, then still takes place.
            return (args[0].flatten(0, 1)[reader.positions].unsqueeze(0),)

        with before(self._model.get_output_embeddings(), keep):
            # Causal attention never looks right, where the padding is: there is nothing to mask.
            logits_1PV = self._model(input_ids=tokens.to(self._model.device), use_cache=False).logits
        reader.read(lambda rows: logits_1PV[0, rows])
        return layout.scores(groups, *reader.result())

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """Refuse: transformers has a generation of its own.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "a transformers model does not generate here; evaluate such tasks with the harness's own HFLM"
        )
