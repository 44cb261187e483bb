"""Incremental detokenization and stop strings."""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from errors import UserError


def stop_at(tokenizer: Tokenizer, strings: Sequence[str]) -> Callable[[int, list[int]], bool]:
    """Return a function that ends a continuation once it contains one of the strings.

    Args:
        tokenizer: The model's tokenizer.
        strings: Stop strings.

    Returns:
        The `stop` argument of generate and stream.

    Raises:
        UserError: A string is empty.
    """
    if "" in strings:
        raise UserError("a stop string is empty: every text contains it; give --stop some text")
    # a token has at least one byte, and the string may begin within a token
    longest = max((len(each.encode()) for each in strings), default=0) + 1

    def has_stop_string(row: int, tokens: list[int]) -> bool:
        tail = tokenizer.decode(tokens[-longest:], skip_special_tokens=False) if strings else ""
        return any(each in tail for each in strings)

    return has_stop_string


class TextStream:
    """Detokenizes a continuation token by token, up to a stop string.

    Args:
        tokenizer: The model's tokenizer.
        stop_strings: The text ends before the first of them.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._tokens: list[int] = []
        self._num_shown = 0

    def add(self, token: int) -> str:
        """Add a token, and return the new text.

        Args:
            token: Its id.

        Returns:
            The text since the last call, without an incomplete character or a prefix of a stop string at its
            end.
        """
        self._tokens.append(token)
        text = self._decode().rstrip("\ufffd")
        held = [n for each in self._stop_strings for n in range(1, len(each)) if text.endswith(each[:n])]
        return self._show(text[: len(text) - max(held, default=0)])

    def end(self) -> str:
        """Return the rest of the text."""
        return self._show(self._decode())

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
        return text[
            : min((text.index(each) for each in self._stop_strings if each in text), default=len(text))
        ]

    def _show(self, text: str) -> str:
        new = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return new
