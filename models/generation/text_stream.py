"""Text of tokens that come one by one, and strings that end it."""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer


def stop_at(tokenizer: Tokenizer, strings: Sequence[str]) -> Callable[[int, list[int]], bool]:
    """A rule for `models.generation` that ends a continuation when one of the strings is in it.

    Args:
        tokenizer: Of the model.
        strings: Any of them ends a text.

    Returns:
        Takes the index of a prompt and its new tokens, each time a token has come.

    Raises:
        ValueError: A string is empty.
    """
    if "" in strings:
        raise ValueError("a stop string is empty; it would end every text at once")
    # a token has a byte at least; the one in which the string begins may have begun before
    longest = max((len(each.encode()) for each in strings), default=0) + 1

    def has_stop_string(row: int, tokens: list[int]) -> bool:
        tail = tokenizer.decode(tokens[-longest:], skip_special_tokens=False) if strings else ""
        return any(each in tail for each in strings)

    return has_stop_string


class TextStream:
    """The text of a continuation as it grows, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        """Begin with nothing.

        Args:
            tokenizer: Of the model.
            stop_strings: The text ends before the first of them.
        """
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._tokens: list[int] = []
        self._num_shown = 0

    def add(self, token: int) -> str:
        """Add a token.

        Args:
            token: Its id.

        Returns:
            What can be shown since the last call: no half characters, no beginning of a stop string.
        """
        self._tokens.append(token)
        text = self._read().rstrip("\ufffd")
        held = [n for each in self._stop_strings for n in range(1, len(each)) if text.endswith(each[:n])]
        return self._show(text[: len(text) - max(held, default=0)])

    def end(self) -> str:
        """What is left to show."""
        return self._show(self._read())

    def _read(self) -> str:
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=False)
        return text[
            : min((text.index(each) for each in self._stop_strings if each in text), default=len(text))
        ]

    def _show(self, text: str) -> str:
        new = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return new
