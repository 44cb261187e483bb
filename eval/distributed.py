"""Ranks in evaluation: collectives that also run on one process, and errors that are raised on all ranks.

An evaluation may fail on one rank alone, for example out of memory. Were it to raise there only, the others
would wait for it in the next collective. So a failure is exchanged first and then raised on all ranks.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from errors import RunError, UserError
from eval.scoring.groups import Group, Scores
from eval.scoring.language_model import LanguageModel

logger = logging.getLogger("parallax")

T = TypeVar("T")


class EvaluationError(RunError):
    """An evaluation failed on some rank; raised on all ranks."""


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main_rank() -> bool:
    """Return whether this process is rank 0, the one that prints and writes results."""
    return rank_and_world_size()[0] == 0


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_gather(value: T) -> list[T]:
    """Gather a picklable value from all ranks, ordered by rank."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def check_same_requests(digests: Sequence[str]) -> None:
    """Check that all ranks were given the same requests.

    Args:
        digests: A hash of each rank's requests, the same list on all ranks.

    Raises:
        UserError: On all ranks: the hashes differ.
    """
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"ranks were given different requests (rank {', '.join(others)}: others than rank 0): let every "
            "rank read the same documents, and draw nothing at random without the same seed"
        )


def run_on_main_rank(work: Callable[[], T]) -> T:
    """Run a function on the main rank and broadcast its result.

    Args:
        work: Run on rank 0 alone; its result is picklable.

    Returns:
        The result, on all ranks.

    Raises:
        UserError: On all ranks: work raised an OSError or a ValueError on rank 0.
    """
    outcome: list[Any] = [None, None]
    if is_main_rank():
        try:
            outcome[0] = work()
        except (OSError, ValueError) as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def raise_on_all_ranks(error: Exception | None, device: torch.device) -> None:
    """Raise on all ranks if any rank has an error; a collective that every rank calls equally often.

    The first rank that failed logs its traceback.

    Args:
        error: The error of this rank; None without one.
        device: Device of the flag that is reduced.

    Raises:
        EvaluationError: On all ranks, with the messages of those that failed.
    """
    failed = torch.tensor(float(error is not None), device=device)
    dist.all_reduce(failed)
    if not failed:
        return
    messages = all_gather(None if error is None else f"{type(error).__name__}: {error}")
    found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if dist.get_rank() == found[0][0]:
        logger.error("an evaluation failed", exc_info=error)
    raise EvaluationError("; ".join(f"rank {rank}: {message}" for rank, message in found)) from None


def run_on_all_ranks(work: Callable[[], T], device: torch.device) -> T:
    """Run a function on all ranks; if it fails on any, raise on all.

    Args:
        work: The function. It may call raise_on_all_ranks itself, before any other collective.
        device: Device of the flag that is reduced.

    Returns:
        This rank's result.

    Raises:
        EvaluationError: On all ranks: work failed on at least one.
    """
    result, failure = None, None
    try:
        result = work()
    except EvaluationError:
        raise
    except Exception as error:  # of any kind: training continues without this evaluation
        failure = error
    raise_on_all_ranks(failure, device)
    return result  # pyrefly: ignore [bad-return]


class RankSafeModel(LanguageModel):
    """A model whose failure on one rank is raised on all ranks, before any waits for another's scores.

    Args:
        model: The model.
        device: Device of the flag that is reduced.
    """

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._failure: Exception | None = None
        self.max_length, self.identity, self.is_padded = model.max_length, model.identity, model.is_padded

    def row_lengths(self, group: Group) -> list[int]:
        """See LanguageModel."""
        return self._model.row_lengths(group)

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        """See LanguageModel; a collective: every rank scores equally many batches."""
        if self._failure is not None:
            raise_on_all_ranks(self._failure, self._device)
        return run_on_all_ranks(lambda: self._model.score(groups), self._device)

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """See LanguageModel; no collective, as ranks may have no prompts: the next collective raises."""
        try:
            if self._failure is None:
                return self._model.generate(
                    prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, stop=stop
                )
        except Exception as error:
            self._failure = error
        return [[] for _ in prompts]

    def finish(self) -> None:
        """Raise the error of a failed generation, if any; call it within run_on_all_ranks.

        Raises:
            Exception: What generate raised on this rank.
        """
        if self._failure is not None:
            raise self._failure
