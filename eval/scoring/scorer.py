"""Requests to batches: cut to length, grouped by context, sorted by length, spread over ranks, and saved."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch.distributed as dist

from eval.scoring.groups import Group, Scores, Tokens
from eval.scoring.language_model import LanguageModel

Request: TypeAlias = tuple[Tokens, Tokens]
T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(value: T) -> list[T]:
    """Every rank's value, by rank."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return [value]
    values: list[T | None] = [None] * world_size
    dist.all_gather_object(values, value)
    return values  # pyrefly: ignore [bad-return]


def truncate(context: Tokens, continuation: Tokens, max_length: int) -> Request:
    """Drop what is too long for a model from the left of the context, as the harness does.

    The last token of a continuation is no input, so that max_length + 1 tokens fit.

    Args:
        context: Token ids, at least one.
        continuation: Token ids.
        max_length: Most tokens of an input.

    Raises:
        ValueError: The continuation leaves no room for a token of context.
    """
    if len(continuation) > max_length:
        raise ValueError(
            f"a continuation has {len(continuation)} tokens, but the model takes {max_length} at once; "
            "give it a larger --max-length if it can, or leave the task out"
        )
    return context[-(max_length + 1 - len(continuation)) :], continuation


def windows(
    num_tokens: int, max_length: int, stride: int | None = None, *, predicted: int = 1
) -> Iterator[tuple[int, int, int]]:
    """Slide a window over a text.

    The first window predicts as much as fits, each later one the next `stride` tokens, with as much context
    as fits. With the default stride these are the harness's disjoint rolling windows.

    Args:
        num_tokens: Tokens of the text.
        max_length: Most tokens of an input.
        stride: Tokens that each window but the first predicts; None for max_length.
        predicted: The first token to predict, at least 1: what comes before it is context.

    Yields:
        (first, predicted, last): tokens [predicted, last) are predicted, from token `first` on.

    Raises:
        ValueError: The stride is not from 1 to max_length.
    """
    stride = max_length if stride is None else stride
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride is {stride}, must be from 1 to {max_length}, the tokens of a window")
    last = min(max(max_length + 1, predicted + stride), num_tokens)
    while predicted < num_tokens:
        yield max(last - 1 - max_length, 0), predicted, last
        predicted, last = last, min(last + stride, num_tokens)


def group_requests(requests: Sequence[Request]) -> list[Group]:
    """Collect what is to be read after the same context; equal requests become one.

    Args:
        requests: Contexts and continuations, neither of them empty.
    """
    continuations: dict[Tokens, dict[Tokens, None]] = {}
    for context, continuation in requests:
        continuations.setdefault(context, {})[continuation] = None
    return [Group(context, tuple(each)) for context, each in continuations.items()]


def plan_batches(model: LanguageModel, groups: Sequence[Group], token_budget: int) -> list[list[int]]:
    """Sort groups by length, longest first, and cut them into batches.

    Args:
        model: Says what a group costs.
        groups: What is to be scored.
        token_budget: Most tokens of a batch, padding included; a group that has more is a batch of its own.

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


def _check_equal(digests: Sequence[str]) -> None:
    """Refuse requests that differ among ranks, of which each has given a hash."""
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"ranks were given different requests (rank {', '.join(others)}: others than rank 0): let every "
            "rank read the same documents, and draw nothing at random without the same seed"
        )


def score_groups(
    model: LanguageModel, groups: Sequence[Group], token_budget: int
) -> Iterator[tuple[list[tuple[int, list[Scores]]], int]]:
    """Score groups, each batch on one rank.

    Args:
        model: The same on every rank; it takes part in as many batches on each, so that it may be sharded.
        groups: The same on every rank.
        token_budget: As plan_batches.

    Yields:
        On every rank, after each round of batches: which groups were scored with their scores, and how many
        tokens went through the model for it.

    Raises:
        ValueError: On every rank: the groups are not the same on all of them.
    """
    rank, world_size = rank_and_world_size()
    batches = plan_batches(model, groups, token_budget)
    digest = _digest(groups) if world_size > 1 else ""
    if not batches:
        _check_equal([each for *_, each in all_gather((None, 0, digest))])
    for first in range(0, len(batches), world_size):
        batch = [groups[index] for index in batches[min(first + rank, len(batches) - 1)]]
        scores = model.score(batch)
        num_tokens = sum(sum(model.row_lengths(group)) for group in batch)
        gathered = all_gather((scores, num_tokens, digest))
        if not first:
            # only now: where a model fails on one rank, it says so to the others before anything is exchanged
            _check_equal([each for _, _, each in gathered])
            digest = ""
        gathered = gathered[: len(batches) - first]
        found: list[tuple[int, list[Scores]]] = []
        for indices, (each, _, _) in zip(batches[first : first + world_size], gathered, strict=True):
            found.extend(zip(indices, each, strict=True))
        yield found, sum(num for _, num, _ in gathered)


class SavedResults:
    """Results of requests in a JSONL file, so that an interrupted evaluation goes on where it stopped."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Read what is there, or begin a file; only rank 0 reads and writes, so that ranks never disagree.

        Args:
            path: The file.
            fingerprint: What the results depend on beside the requests: weights, tokenizer.

        Raises:
            ValueError: On every rank: the file holds results of something else, is none of ours, or cannot
                be read and written.
        """
        self._path = path
        rank, world_size = rank_and_world_size()
        self._is_writer = rank == 0
        outcome: list[Any] = [None, None]
        if self._is_writer:
            try:
                outcome[0] = self._open(fingerprint)
            except (OSError, ValueError) as error:
                outcome[1] = str(error)
        if world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        self._results: dict[str, Any] = outcome[0]

    def _open(self, fingerprint: str) -> dict[str, Any]:
        path = self._path
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        # What an interruption cut off has no line end.
        complete = lines[:-1]
        results: dict[str, Any] = {}
        for number, line in enumerate(complete, 1):
            try:
                key, value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no saved result ({error}): delete it") from None
            if number == 1 and (key, value) != ("fingerprint", fingerprint):
                raise ValueError(
                    f"{path} holds results of another checkpoint or tokenizer ({value}, this is "
                    f"{fingerprint}): give another --out, or delete it"
                )
            results[key] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+" if complete else "w", encoding="utf-8") as file:
            file.seek(sum(len(line.encode()) + 1 for line in complete))
            file.truncate()
            if not complete:
                file.write(json.dumps(["fingerprint", fingerprint]) + "\n")
        return results

    @staticmethod
    def key(*request: Any) -> str:
        """A hash of a request: of anything that JSON can hold."""
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]

    def get(self, key: str) -> Any:
        """The result of a request, None if it has none yet."""
        return self._results.get(key)

    def add(self, results: dict[str, Any]) -> None:
        """Keep results by their keys."""
        self._results.update(results)
        if self._is_writer:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, value]) + "\n" for key, value in results.items())


class Scorer:
    """Sums the log-probabilities of continuations, each at most once.

    Attributes:
        num_tokens: Tokens that went through the model, on all ranks.
        num_reused: Requests that were not computed since their results were saved.
    """

    def __init__(self, model: LanguageModel, *, token_budget: int, saved: SavedResults | None = None) -> None:
        """Describe what scores.

        Args:
            model: The model.
            token_budget: Most tokens of a batch.
            saved: Results of earlier requests; gets the new ones.
        """
        self._model = model
        self._token_budget = token_budget
        self._saved = saved
        self.num_tokens = 0
        self.num_reused = 0

    def log_likelihoods(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Score requests.

        Args:
            requests: Contexts, of at least one token, and continuations; contexts too long for the model lose
                their beginning.

        Returns:
            For each the sum of its log-probabilities in nats, and whether all its tokens are greedy;
            (0.0, True) for a continuation without a token.

        Raises:
            ValueError: A continuation is too long for the model.
        """
        wanted = [truncate(tuple(a), tuple(b), self._model.max_length) for a, b in requests]
        results = {request: (0.0, True) for request in wanted if not request[1]}
        keys = {request: SavedResults.key(*request) for request in wanted} if self._saved else {}
        if self._saved is not None:
            for request, key in keys.items():
                if (found := self._saved.get(key)) is not None:
                    results[request] = (found[0], found[1])
                    self.num_reused += 1
        groups = group_requests([request for request in wanted if request not in results])
        for round_scores, num_tokens in score_groups(self._model, groups, self._token_budget):
            new: dict[str, Any] = {}
            for index, scores in round_scores:
                group = groups[index]
                for continuation, each in zip(group.continuations, scores, strict=True):
                    request = (group.context, continuation)
                    results[request] = (sum(each.log_probs), all(each.greedy))
                    if self._saved is not None:
                        new[keys[request]] = results[request]
            self.num_tokens += num_tokens
            if self._saved is not None:
                self._saved.add(new)
        return [results[request] for request in wanted]

    def continuations(
        self,
        prompts: Sequence[list[int]],
        until: Sequence[list[str]],
        max_new_tokens: int,
        stop_ids: Collection[int],
        stop: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """Continue prompts greedily, each at most once; a rank takes its share.

        Args:
            prompts: Token ids of each, at least one.
            until: What ends each of them: part of what its result is saved under.
            max_new_tokens: Most tokens of a continuation.
            stop_ids: Tokens that end a continuation and belong to it.
            stop: Given a prompt's index and its continuation so far, whether that ends here.

        Returns:
            The continuations' token ids.

        Raises:
            ValueError: On every rank: the prompts are not the same on all of them.
        """
        keys = [
            SavedResults.key("generate", *each, max_new_tokens) for each in zip(prompts, until, strict=True)
        ]
        results: dict[str, list[int]] = {}
        for key in keys:
            if self._saved is not None and (text := self._saved.get(key)) is not None:
                results[key] = text
                self.num_reused += 1
        missing = {key: index for index, key in enumerate(keys) if key not in results}
        order = sorted(missing.values(), key=lambda index: len(prompts[index]), reverse=True)
        rank, world_size = rank_and_world_size()
        digest = SavedResults.key(*keys)
        while order:
            longest = len(prompts[order[0]]) + max_new_tokens
            count = max(1, self._token_budget // longest)
            shares = [order[each * count : (each + 1) * count] for each in range(world_size)]
            own, order = shares[rank], order[world_size * count :]
            found = (
                self._model.generate(
                    [prompts[index] for index in own],
                    max_new_tokens=max_new_tokens,
                    stop_ids=stop_ids,
                    stop=lambda index, tokens, own=own: stop(own[index], tokens),
                )
                if own
                else []
            )
            gathered = all_gather((found, digest))
            _check_equal([each for _, each in gathered])
            new: dict[str, list[int]] = {}
            for share, (texts, _) in zip(shares, gathered, strict=True):
                new.update({keys[index]: text for index, text in zip(share, texts, strict=True)})
                self.num_tokens += sum(len(prompts[i]) + len(t) for i, t in zip(share, texts, strict=True))
            results.update(new)
            if self._saved is not None:
                self._saved.add(new)
        return [results[key] for key in keys]
