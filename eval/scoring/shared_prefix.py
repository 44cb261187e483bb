"""Continuations of a shared context: the context is read into a cache once, then all continuations at a time.

Continuations are padded on the right, to lengths of which there are few, so that those of about one length go
through the model together.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from eval.scoring.groups import Group, Rows, Scores, rows_of
from eval.scoring.head_scores import Layout, Reader, head_logits
from models.generation.cache import Cache, extend, prefill
from models.qwen3 import Qwen3

# Beyond the last, reading the cache anew for every few tokens costs more than the context does.
_LENGTHS = (1, 2, 4, *range(8, 65, 8))
# Sharing saves tokens, but costs launches and copies of the cache.
_LARGEST_SHARE = 0.75
_CACHE_ELEMENTS = 1 << 31


def shared_length(group: Group, rows: Rows) -> int | None:
    """How long to make a group's rows behind their context.

    Args:
        group: The context and its continuations.
        rows: From rows_of.

    Returns:
        Tokens, those of padding included; None where one forward over whole rows is better.
    """
    longest = max(map(len, rows.tails))
    padded = next((length for length in _LENGTHS if length >= longest), None)
    if not longest or padded is None:
        return None
    whole = sum(len(group.context) + len(tail) for tail in rows.tails)
    shared = len(group.context) + padded * len(rows.tails)
    return padded if shared <= _LARGEST_SHARE * whole else None


def _parts(model: Qwen3, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
    """Groups whose cache fits, a few at a time."""
    longest = max(len(group.context) + _LENGTHS[-1] for group in groups)
    room = max(_CACHE_ELEMENTS // model.num_cache_elements(longest), 1)
    first = rows = 0
    for index, group in enumerate(groups):
        rows += 1 + len(group.continuations)
        if rows > room and index > first:
            yield groups[first:index]
            first, rows = index, 1 + len(group.continuations)
    yield groups[first:]


def score_shared(model: Qwen3, groups: Sequence[Group]) -> list[list[Scores]]:
    """Score groups by a forward over their contexts and one over each length of continuations.

    Args:
        model: Whose attentions keep keys and values.
        groups: That shared_length is not None for.

    Returns:
        Scores of every group's continuations, in order.
    """
    if not groups:
        return []
    return [scores for part in _parts(model, groups) for scores in _score_part(model, part)]


def _score_part(model: Qwen3, groups: Sequence[Group]) -> list[list[Scores]]:
    device = model.tok_embeddings.weight.device
    rows = [rows_of(group) for group in groups]
    lengths = [shared_length(group, each) or 0 for group, each in zip(groups, rows, strict=True)]
    bounds = [0, *accumulate(len(group.context) for group in groups)]
    longest = max(len(group.context) + length for group, length in zip(groups, lengths, strict=True))
    cache = Cache.new(model, len(groups), longest)
    contexts = torch.tensor([[token for group in groups for token in group.context]], device=device)
    x_1TD = prefill(model, contexts, torch.tensor(bounds, dtype=torch.int32, device=device), cache)
    # first what the first tokens are read from, then the rows of each length
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
    layout = Layout([], [])
    for index, (group, each) in enumerate(zip(groups, rows, strict=True)):
        for continuation, row in zip(group.continuations, each.row_of, strict=True):
            layout.add(index, continuation[:1])
            layout.add(starts[index, row], continuation[1:])
    reader = Reader(layout, device)
    x_PD, weight = torch.cat(hidden)[reader.positions], model.output.weight
    reader.read(lambda part: head_logits(x_PD[part], weight))
    return layout.scores(groups, *reader.result())
