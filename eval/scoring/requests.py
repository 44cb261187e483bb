"""Requests: a context and its continuation, where the continuation starts, and what fits into the model."""

from collections.abc import Sequence
from typing import TypeAlias

from errors import UserError
from eval.scoring.groups import Tokens

Request: TypeAlias = tuple[Tokens, Tokens]
"""Context and continuation."""


def continuation_start(context: Sequence[int], whole: Sequence[int]) -> int:
    """Return where a continuation starts in the tokens of a context and its continuation together.

    That is after their longest common prefix: a token that begins in the context and ends in the continuation
    ("pri" + "nt" is the one token "print") is no part of the context, but is predicted, as are all after it.

    Args:
        context: Token ids of the context.
        whole: Token ids of the context and a continuation that is not empty, at least one.

    Returns:
        Index of the first predicted token. At least the last one is predicted, even where the normalizer
        leaves nothing of the continuation.
    """
    pairs = zip(context, whole, strict=False)
    common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(context), len(whole)))
    return min(common, len(whole) - 1)


def num_excess(context: Sequence[int], continuation: Sequence[int], max_length: int) -> int:
    """Return how many tokens of a context do not fit into the model before a continuation.

    The last token of the continuation is no input, so max_length + 1 tokens fit.
    """
    return max(len(context) + len(continuation) - max_length - 1, 0)


def truncate(context: Tokens, continuation: Tokens, max_length: int) -> Request:
    """Truncate a context from the left to what fits into the model, as the harness does.

    Args:
        context: Token ids, at least one.
        continuation: Token ids.
        max_length: Most tokens of an input.

    Raises:
        UserError: The continuation leaves no room for a token of context.
    """
    if len(continuation) > max_length:
        raise UserError(
            f"a continuation has {len(continuation)} tokens, but the model's max_length is {max_length}; "
            "give a larger --max-length if it can, or leave the task out"
        )
    return context[num_excess(context, continuation, max_length) :], continuation
