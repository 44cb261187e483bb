"""The unit of scoring: a context with its continuations, their scores, and the input rows that hold them."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A context and its continuations.

    Attributes:
        context: Token ids, at least one.
        continuations: Token ids of each, at least one; no duplicates.
    """

    context: Tokens
    continuations: tuple[Tokens, ...]


class Scores(NamedTuple):
    """Scores of a continuation, per token.

    Attributes:
        log_probs: Log-probability in nats of each token given all before it.
        greedy: Whether each token is the most probable one.
    """

    log_probs: list[float]
    greedy: list[bool]


class Rows(NamedTuple):
    """Input rows of a group, each the context and a tail.

    Attributes:
        tails: Token ids that follow the context in each row; none is a prefix of another.
        row_of: Row of each continuation.
    """

    tails: list[Tokens]
    row_of: list[int]


def rows_of(group: Group) -> Rows:
    """Pack a group's continuations into as few rows as possible.

    The last token of a continuation is no input, so a continuation of one token needs the context alone; one
    whose inputs are a prefix of another's shares that row.

    Args:
        group: The context and its continuations.
    """
    tails = [continuation[:-1] for continuation in group.continuations]
    rows = Rows([], [0] * len(tails))
    # in descending lexicographic order a tail comes right after one that extends it
    for index in sorted(range(len(tails)), key=tails.__getitem__, reverse=True):
        if not rows.tails or rows.tails[-1][: len(tails[index])] != tails[index]:
            rows.tails.append(tails[index])
        rows.row_of[index] = len(rows.tails) - 1
    return rows
