"""What is asked of a language model: continuations of contexts; and what it answers."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A context and the texts that may follow it.

    Attributes:
        context: Token ids, at least one.
        continuations: Token ids of each, at least one; different from one another.
    """

    context: Tokens
    continuations: tuple[Tokens, ...]


class Scores(NamedTuple):
    """What a model makes of one continuation, token by token.

    Attributes:
        log_probs: Natural logarithm of each token's probability given all before it.
        greedy: Whether each token is the most probable one.
    """

    log_probs: list[float]
    greedy: list[bool]


class Rows(NamedTuple):
    """Inputs that hold all of a group's continuations.

    Attributes:
        tails: What follows the context in each row; none begins another.
        row_of: Each continuation's row.
    """

    tails: list[Tokens]
    row_of: list[int]


def rows_of(group: Group) -> Rows:
    """Lay a group's continuations into as few rows as possible.

    A continuation's last token is no input, so that those of one token need the context alone; a row that
    begins another is read from that one.

    Args:
        group: The context and its continuations.
    """
    tails = [continuation[:-1] for continuation in group.continuations]
    rows = Rows([], [0] * len(tails))
    # Backwards in lexicographic order, what extends a tail has come just before it.
    for index in sorted(range(len(tails)), key=tails.__getitem__, reverse=True):
        if not rows.tails or rows.tails[-1][: len(tails[index])] != tails[index]:
            rows.tails.append(tails[index])
        rows.row_of[index] = len(rows.tails) - 1
    return rows
