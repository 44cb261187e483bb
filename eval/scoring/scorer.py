"""Batched scoring: requests are grouped by context, sorted by length and spread over ranks."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from data.progress import Progress
from errors import UserError
from eval.distributed import all_gather, check_same_requests, rank_and_world_size
from eval.scoring.groups import Group, Scores, Tokens
from eval.scoring.language_model import LanguageModel
from eval.scoring.requests import Request, truncate
from eval.scoring.saved_results import SavedResults

K = TypeVar("K")


def windows(
    num_tokens: int, max_length: int, stride: int | None = None, *, first_predicted: int = 1
) -> Iterator[tuple[int, int, int]]:
    """Slide a window over a text, so that every token is predicted exactly once.

    The first window predicts as many tokens as fit, each later one the next `stride` tokens, with as much
    context as fits. A window is max_length + 1 tokens long, as its last token is no input. With the default
    stride, max_length, these are the rolling windows of the harness.

    Example: 11 tokens, max_length 4. Token 0 starts the text and is never predicted. "c" is a token that is
    context only, "P" a predicted one.

        token            0 1 2 3 4 5 6 7 8 9 10

        stride 4         c P P P P                    (0, 1, 5)
                                 c P P P P            (4, 5, 9)
                                     c c c P P        (6, 9, 11)

        stride 2         c P P P P                    (0, 1, 5)
                             c c c P P                (2, 5, 7)
                                 c c c P P            (4, 7, 9)
                                     c c c P P        (6, 9, 11)

    The window (4, 5, 9) has tokens 4 to 7 as input and predicts tokens 5 to 8, from 1 to 4 tokens of context
    each. At stride 2 the same tokens have 3 or 4 tokens of context: a smaller stride gives a lower loss and
    costs more windows.

    Args:
        num_tokens: Tokens of the text.
        max_length: Most tokens of an input.
        stride: Tokens that each window but the first predicts; None for max_length.
        first_predicted: Index of the first token to predict, at least 1; earlier tokens are context.

    Yields:
        (start, predicted, end): the window holds tokens [start, end) and predicts [predicted, end).

    Raises:
        UserError: The stride is not from 1 to max_length.
    """
    stride = max_length if stride is None else stride
    if not 1 <= stride <= max_length:
        raise UserError(f"stride is {stride}, must be from 1 to {max_length}, the tokens of a window")
    predicted = first_predicted
    end = min(max(max_length + 1, predicted + stride), num_tokens)
    while predicted < num_tokens:
        yield max(end - 1 - max_length, 0), predicted, end
        predicted, end = end, min(end + stride, num_tokens)


def group_requests(requests: Sequence[Request]) -> list[Group]:
    """Group continuations by context, without duplicates.

    Args:
        requests: Contexts and continuations, all nonempty.
    """
    continuations: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in requests:
        continuations.setdefault(context, {})[continuation] = None
    return [Group(context, tuple(each)) for context, each in continuations.items()]


def plan_batches(model: LanguageModel, groups: Sequence[Group], token_budget: int) -> list[list[int]]:
    """Sort groups by length, longest first, and cut them into batches.

    Args:
        model: Gives the lengths of a group's rows.
        groups: The groups to score.
        token_budget: Most tokens per batch, padding included; a longer group is a batch of its own.

    Returns:
        Indices into groups.
    """
    lengths = [model.row_lengths(group) for group in groups]
    batches: list[list[int]] = []
    rows = tokens = longest = 0
    for index in sorted(range(len(groups)), key=lambda index: max(lengths[index]), reverse=True):
        rows, tokens = rows + len(lengths[index]), tokens + sum(lengths[index])
        if not batches or (rows * longest if model.is_padded else tokens) > token_budget:
            batches.append([])
            rows, tokens, longest = len(lengths[index]), sum(lengths[index]), max(lengths[index])
        batches[-1].append(index)
    return batches


def _digest(groups: Sequence[Group]) -> str:
    digest = hashlib.sha256()
    for group in groups:
        digest.update(repr((group.context, group.continuations)).encode())
    return digest.hexdigest()


def score_groups(
    model: LanguageModel, groups: Sequence[Group], token_budget: int
) -> Iterator[tuple[list[tuple[int, list[Scores]]], int]]:
    """Score groups; in each round every rank scores one batch.

    Args:
        model: The same on all ranks; it scores equally many batches on each, so that it may be sharded.
        groups: The same on all ranks.
        token_budget: As for plan_batches.

    Yields:
        On all ranks, after each round: the indices and scores of the groups of all its batches, and the
        number of tokens that went through the model.

    Raises:
        UserError: On all ranks: their groups differ.
    """
    rank, world_size = rank_and_world_size()
    batches = plan_batches(model, groups, token_budget)
    digest = _digest(groups) if world_size > 1 else ""
    if not batches:
        check_same_requests([each for *_, each in all_gather((None, 0, digest))])
    for first in range(0, len(batches), world_size):
        # ranks without a batch in the last round repeat its last one
        batch = [groups[index] for index in batches[min(first + rank, len(batches) - 1)]]
        scores = model.score(batch)
        num_tokens = sum(sum(model.row_lengths(group)) for group in batch)
        gathered = all_gather((scores, num_tokens, digest))
        if not first:
            # only now: a rank that failed earlier is in raise_on_all_ranks, as is RankSafeModel.score
            check_same_requests([each for _, _, each in gathered])
            digest = ""
        gathered = gathered[: len(batches) - first]
        found: list[tuple[int, list[Scores]]] = []
        for indices, (each, _, _) in zip(batches[first : first + world_size], gathered, strict=True):
            found.extend(zip(indices, each, strict=True))
        yield found, sum(num for _, num, _ in gathered)


def plan_generation(
    lengths: Mapping[int, int], token_budget: int, world_size: int
) -> Iterator[list[list[int]]]:
    """Sort prompts by length, longest first, and cut them into rounds of one batch per rank.

    Args:
        lengths: Index of each prompt -> its tokens and those it may get.
        token_budget: Most tokens per batch, padding included; a longer prompt is a batch of its own.
        world_size: Number of ranks.

    Yields:
        For each round the indices of each rank's prompts; in the last round some ranks may have none.
    """
    order = sorted(lengths, key=lambda index: lengths[index], reverse=True)
    while order:
        count = max(1, token_budget // lengths[order[0]])
        yield [order[rank * count : (rank + 1) * count] for rank in range(world_size)]
        order = order[world_size * count :]


class Scorer:
    """Computes log-likelihoods and greedy continuations, each distinct request once.

    Args:
        model: The model.
        token_budget: Most tokens per batch.
        saved: Results of earlier requests, to which new ones are added; None to save nothing.
        progress: Told how much of each call is done.

    Attributes:
        num_tokens: Tokens that went through the model, on all ranks.
        num_reused: Requests whose results were saved already.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        token_budget: int,
        saved: SavedResults | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._token_budget = token_budget
        self._saved = saved
        self._progress = progress or Progress(is_on=False)
        self.num_tokens = 0
        self.num_reused = 0

    def log_likelihoods(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Compute the log-likelihood of each continuation given its context.

        Args:
            requests: Token ids of contexts, each at least one, and of continuations. A context that is too
                long for the model is truncated from the left.

        Returns:
            For each request the sum of the continuation's log-probabilities in nats, and whether all its
            tokens are greedy; (0.0, True) for an empty continuation.

        Raises:
            UserError: A continuation is too long for the model.
        """
        wanted = [truncate(tuple(a), tuple(b), self._model.max_length) for a, b in requests]
        results = {request: (0.0, True) for request in wanted if not request[1]}
        keys = {request: SavedResults.key(*request) for request in wanted} if self._saved else {}
        saved = self._take_saved(keys)
        results |= {request: (found[0], found[1]) for request, found in saved.items()}
        groups = group_requests([request for request in wanted if request not in results])
        self._progress.start(f"log-likelihoods after {len(groups):,} contexts")
        num_left = sum(sum(self._model.row_lengths(group)) for group in groups)
        num_done = 0
        for round_scores, num_tokens in score_groups(self._model, groups, self._token_budget):
            new: dict[Request, tuple[float, bool]] = {}
            for index, scores in round_scores:
                group = groups[index]
                for continuation, each in zip(group.continuations, scores, strict=True):
                    new[group.context, continuation] = (sum(each.log_probs), all(each.greedy))
            self.num_tokens += num_tokens
            num_done += num_tokens
            self._progress.update(num_done / num_left)
            results |= new
            if self._saved is not None:
                self._saved.add({keys[request]: result for request, result in new.items()})
        return [results[request] for request in wanted]

    def generate(
        self,
        prompts: Sequence[list[int]],
        until: Sequence[list[str]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """Continue prompts greedily, each rank a share of them.

        Args:
            prompts: Token ids of each, at least one.
            until: Stop strings of each prompt; part of the key under which its result is saved.
            max_new_tokens: Most tokens of a continuation.
            stop_ids: Tokens that end a continuation and belong to it.
            stop: Given a prompt's index and its continuation so far, returns whether it ends here.

        Returns:
            Token ids of the continuations.

        Raises:
            UserError: On all ranks: their prompts differ.
        """
        keys = [
            SavedResults.key("generate", *each, max_new_tokens) for each in zip(prompts, until, strict=True)
        ]
        saved = self._take_saved(dict(enumerate(keys)))
        results: dict[str, list[int]] = {keys[index]: tokens for index, tokens in saved.items()}
        # equal prompts with equal stop strings are one
        missing = {key: index for index, key in enumerate(keys) if key not in results}
        digest = SavedResults.key(*keys)
        rank, world_size = rank_and_world_size()
        lengths = {index: len(prompts[index]) + max_new_tokens for index in missing.values()}
        self._progress.start(f"answers to {len(missing):,} prompts")
        num_done = 0
        for shares in plan_generation(lengths, self._token_budget, world_size):
            found = self._generate_share(prompts, shares[rank], max_new_tokens, stop_ids, stop)
            gathered = all_gather((found, digest))
            check_same_requests([each for _, each in gathered])
            new: dict[str, list[int]] = {}
            for share, (continuations, _) in zip(shares, gathered, strict=True):
                for index, tokens in zip(share, continuations, strict=True):
                    new[keys[index]] = tokens
                    self.num_tokens += len(prompts[index]) + len(tokens)
            results |= new
            num_done += len(new)
            self._progress.update(num_done / len(missing))
            if self._saved is not None:
                self._saved.add(new)
        return [results[key] for key in keys]

    def _take_saved(self, keys: Mapping[K, str]) -> dict[K, Any]:
        """Return the saved results by request, given each request's key, and count them as reused."""
        if self._saved is None:
            return {}
        found = {request: self._saved.get(key) for request, key in keys.items()}
        found = {request: result for request, result in found.items() if result is not None}
        self.num_reused += len(found)
        return found

    def _generate_share(
        self,
        prompts: Sequence[list[int]],
        share: Sequence[int],
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """Continue the prompts of one rank, of which share holds the indices."""
        if not share:
            return []
        return self._model.generate(
            [prompts[index] for index in share],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            stop=lambda index, tokens: stop(share[index], tokens),
        )
