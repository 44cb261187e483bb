"""What may fail on one rank alone: then it fails on all of them, and none waits for another."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from eval.scoring.language_model import Group, LanguageModel, Scores
from training.log import logger

T = TypeVar("T")


class EvaluationError(RuntimeError):
    """An evaluation failed on some rank; raised on all."""


def agree(error: Exception | None, device: torch.device) -> None:
    """Let all ranks know whether one has failed. Every rank calls this as often, until it raises.

    Args:
        error: What happened on this rank; None if nothing has.
        device: Where the exchanged flag lies.

    Raises:
        EvaluationError: On every rank, with what happened on those that failed.
    """
    failed = torch.tensor(float(error is not None), device=device)
    dist.all_reduce(failed)
    if not failed:
        return
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}")
    found = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if dist.get_rank() == found[0][0]:
        logger.error("an evaluation failed", exc_info=error)
    raise EvaluationError("; ".join(f"rank {rank}: {text}" for rank, text in found)) from None


def together(work: Callable[[], T], device: torch.device) -> T:
    """Do something on all ranks that may fail on any.

    Args:
        work: What to do. It may itself agree, before it exchanges anything else.
        device: As of agree.

    Raises:
        EvaluationError: As of agree.
    """
    result, failure = None, None
    try:
        result = work()
    except EvaluationError:
        raise
    except Exception as error:  # whatever it is: training goes on
        failure = error
    agree(failure, device)
    return result  # pyrefly: ignore [bad-return]


class AgreeingModel(LanguageModel):
    """A model that fails on every rank where it fails on one, before ranks wait for each other's results."""

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        """Wrap a model.

        Args:
            model: The model.
            device: As of agree.
        """
        self._model = model
        self._device = device
        self._failure: Exception | None = None
        self.max_length, self.identity, self.is_padded = model.max_length, model.identity, model.is_padded

    def row_lengths(self, group: Group) -> list[int]:
        """See LanguageModel."""
        return self._model.row_lengths(group)

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        """See LanguageModel; every rank scores as many batches."""
        if self._failure is not None:
            agree(self._failure, self._device)
        return together(lambda: self._model.score(groups), self._device)

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """See LanguageModel; not every rank has prompts, so that a failure is kept for the next agreement."""
        try:
            if self._failure is None:
                return self._model.generate(
                    prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, stop=stop
                )
        except Exception as error:
            self._failure = error
        return [[] for _ in prompts]

    def finish(self) -> None:
        """Fail on every rank if generation has failed on one.

        Raises:
            Exception: What happened on this rank.
        """
        if self._failure is not None:
            raise self._failure
