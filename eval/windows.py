"""Cuts texts that are longer than a model takes into windows, each token predicted once."""

from collections.abc import Iterator


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
