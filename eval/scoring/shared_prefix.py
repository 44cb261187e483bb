"""Scoring of continuations that share a context: one prefill of the context, then passes over its KV cache.

Continuations are padded on the right to one of a few lengths, so that those of about equal length form one
batch.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from eval.scoring.groups import Group, Rows, Scores, rows_of
from eval.scoring.head_scores import ScoredTokens, TokenScorer
from models.generation.cache import Cache, extend, prefill
from models.qwen3 import Qwen3

# tails longer than the last cost more in attention over the cache than a second pass over the context
_LENGTHS = (1, 2, 4, *range(8, 65, 8))
# sharing saves tokens but costs launches and copies of the cache: it must save a quarter of the tokens
_MAX_TOKEN_RATIO = 0.75
_MAX_CACHE_ELEMENTS = 1 << 31


def shared_length(group: Group, rows: Rows) -> int | None:
    """Return the padded length of a group's tails, if its context is to be shared.

    Args:
        group: The context and its continuations.
        rows: From rows_of.

    Returns:
        Tokens of each tail, padding included; None where one forward over whole rows is cheaper.
    """
    longest = max(map(len, rows.tails))
    padded = next((length for length in _LENGTHS if length >= longest), None)
    if not longest or padded is None:
        return None
    whole = sum(len(group.context) + len(tail) for tail in rows.tails)
    shared = len(group.context) + padded * len(rows.tails)
    return padded if shared <= _MAX_TOKEN_RATIO * whole else None


def _split_by_cache(model: Qwen3, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
    """Yield consecutive groups whose cache fits into memory."""
    longest = max(len(group.context) + _LENGTHS[-1] for group in groups)
    max_rows = max(_MAX_CACHE_ELEMENTS // model.num_cache_elements(longest), 1)
    first = rows = 0
    for index, group in enumerate(groups):
        rows += 1 + len(group.continuations)
        if rows > max_rows and index > first:
            yield groups[first:index]
            first, rows = index, 1 + len(group.continuations)
    yield groups[first:]


def score_shared(model: Qwen3, groups: Sequence[Group]) -> list[list[Scores]]:
    """Score groups by one prefill of their contexts and one pass per length of their tails.

    Args:
        model: A model whose attention layers all have a KV cache.
        groups: Groups for which shared_length is not None.

    Returns:
        Scores of every group's continuations, in order.
    """
    if not groups:
        return []
    return [scores for part in _split_by_cache(model, groups) for scores in _score_part(model, part)]


def _score_part(model: Qwen3, groups: Sequence[Group]) -> list[list[Scores]]:
    device = model.tok_embeddings.weight.device
    rows = [rows_of(group) for group in groups]
    lengths = [shared_length(group, each) or 0 for group, each in zip(groups, rows, strict=True)]
    bounds = [0, *accumulate(len(group.context) for group in groups)]
    longest = max(len(group.context) + length for group, length in zip(groups, lengths, strict=True))
    cache = Cache.new(model, len(groups), longest)
    contexts = torch.tensor([[token for group in groups for token in group.context]], device=device)
    x_1TD = prefill(model, contexts, torch.tensor(bounds, dtype=torch.int32, device=device), cache)
    # each context's last position, which predicts all first tokens, then the tails by length
    hidden = [x_1TD[0, torch.tensor(bounds[1:], device=device) - 1]]
    starts: dict[tuple[int, int], int] = {}
    num_positions = len(groups)
    for length in sorted(set(lengths)):
        owners = [
            (index, row)
            for index, each in enumerate(rows)
            if lengths[index] == length
            for row in range(len(each.tails))
        ]
        tokens = torch.zeros(len(owners), length, dtype=torch.int64)
        for line, (index, row) in enumerate(owners):
            tail = rows[index].tails[row]
            tokens[line, : len(tail)] = torch.tensor(tail)
            starts[index, row] = num_positions + line * length
        copies = cache.select(torch.tensor([index for index, _ in owners], device=device))
        hidden.append(extend(model, tokens.to(device), copies).flatten(0, 1))
        num_positions += len(owners) * length
    scored = ScoredTokens([], [])
    for index, (group, each) in enumerate(zip(groups, rows, strict=True)):
        for continuation, row in zip(group.continuations, each.row_of, strict=True):
            scored.add(index, continuation[:1])
            scored.add(starts[index, row], continuation[1:])
    scorer = TokenScorer(scored, device)
    x_PD = torch.cat(hidden)[scorer.positions]
    scorer.score(lambda chunk: model.output.logits(x_PD[chunk]))
    return scored.split(groups, *scorer.result())
