"""Incremental detokenization behind a prompt, and stop strings."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from errors import UserError

Decode: TypeAlias = Callable[[list[int]], str]
"""Returns the text of token ids, special tokens included."""

# of the prompt, before new tokens: more than the bytes of a character, each of which may be a token
_MAX_TOKENS_BEFORE = 16


def decode_behind(decode: Decode, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text that tokens add to a prompt.

    A decoder may strip the space that its first token begins with: "\u2581return" and "\u2581cur" together
    are "return cur", but "\u2581cur" alone is "cur". So the tokens are decoded behind the end of the prompt,
    whose text is taken off again.

    Args:
        decode: Decodes token ids.
        prompt: Token ids before them; none at the start of a text, where such a space is no part of it.
        tokens: Token ids.
    """
    before = _end_of(decode, prompt[-_MAX_TOKENS_BEFORE:])
    num_before = len(decode(before))
    return decode([*before, *tokens])[num_before:]


def _end_of(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """Return the shortest end of a prompt that has text and begins with a whole character."""
    for length in range(1, len(prompt)):
        end = list(prompt[-length:])
        text = decode(end)
        if text and "\ufffd" not in text:
            return end
    return list(prompt)


def stop_at(
    decode: Decode, strings: Sequence[str], prompts: Sequence[Sequence[int]]
) -> Callable[[int, list[int]], bool]:
    """Return a function that ends a continuation once it contains one of the strings.

    Args:
        decode: Decodes token ids.
        strings: Stop strings.
        prompts: Token ids of each prompt, as for decode_behind.

    Returns:
        The `stop` argument of generate and stream.

    Raises:
        UserError: A string is empty.
    """
    if "" in strings:
        raise UserError("a stop string is empty: every text contains it; give --stop some text")
    # a token has at least one byte, and the string may begin within a token
    longest = max((len(each.encode()) for each in strings), default=0) + 1
    ends = [list(prompt[-_MAX_TOKENS_BEFORE:]) for prompt in prompts]

    def has_stop_string(row: int, tokens: list[int]) -> bool:
        if not strings:
            return False
        before = ends[row] + tokens[-longest - _MAX_TOKENS_BEFORE : -longest]
        tail = decode_behind(decode, before, tokens[-longest:])
        return any(each in tail for each in strings)

    return has_stop_string


class TextStream:
    """Detokenizes the continuation of a prompt token by token, up to a stop string.

    Args:
        decode: Decodes token ids.
        stop_strings: The text ends before the first of them.
        prompt: Token ids of the prompt, as for decode_behind.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str], prompt: Sequence[int]) -> None:
        self._decode, self._stop_strings = decode, stop_strings
        self._before = list(prompt)
        # tokens after the last whole character, and the text before them
        self._pending: list[int] = []
        self._text = ""
        self._num_shown = 0

    def add(self, token: int) -> str:
        """Add a token, and return the new text.

        Args:
            token: Its id.

        Returns:
            The text since the last call, without an incomplete character or a prefix of a stop string at its
            end.
        """
        self._pending.append(token)
        new = decode_behind(self._decode, self._before, self._pending)
        if new and not new.endswith("\ufffd"):
            self._text += new
            self._before = [*self._before, *self._pending][-_MAX_TOKENS_BEFORE:]
            self._pending, new = [], ""
        text = self._until_stop(self._text + new.rstrip("\ufffd"))
        held = [n for each in self._stop_strings for n in range(1, len(each)) if text.endswith(each[:n])]
        return self._show(text[: len(text) - max(held, default=0)])

    def end(self) -> str:
        """Return the rest of the text."""
        rest = decode_behind(self._decode, self._before, self._pending)
        return self._show(self._until_stop(self._text + rest))

    def _until_stop(self, text: str) -> str:
        found = [text.index(each) for each in self._stop_strings if each in text]
        return text[: min(found, default=len(text))]

    def _show(self, text: str) -> str:
        new = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return new
