"""Several sources as one, each giving its share of the text and repeating at its own rate.

The next row comes from the source that is furthest behind its share: the one whose amount of text so far,
divided by its weight, is least. After any number of documents every share is so exact to within about one
document of each source, no random numbers are needed, and a position is one position and one count a source.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping

from data.sources.base import DocumentSource, Position, Row

# So that shards and text can be mixed: English text has about four and a half characters a token.
_CHARACTERS_A_TOKEN = 4


class MixtureDocuments:
    """The documents of several sources in the proportions of their weights."""

    def __init__(self, sources: Mapping[str, DocumentSource], weights: Mapping[str, float]) -> None:
        """Join sources.

        Args:
            sources: By name; the order does not matter.
            weights: Share of each source, by the same names.
        """
        self._sources = dict(sorted(sources.items()))
        self._weights = weights

    def __str__(self) -> str:
        """Name the sources."""
        return "mixture of " + ", ".join(f"{name} ({source})" for name, source in self._sources.items())

    @property
    def fingerprint(self) -> str:
        """A short hash of the sources and their weights."""
        parts = {name: [source.fingerprint, self._weights[name]] for name, source in self._sources.items()}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield every row from a position on.

        Args:
            position: `after` of the row before the first; None for the start.
            repeat: Whether each source begins again at its end. If not, a source that has ended is left out,
                and the mixture ends with the last one.

        Raises:
            ValueError: If a source cannot be read, or a whole pass of it holds no document.
        """
        start: Position = {name: {"position": None, "drawn": 0} for name in self._sources}
        state: Position = start if position is None else position
        rows = {
            name: source.read(state[name]["position"], repeat=repeat)
            for name, source in self._sources.items()
        }
        while rows:
            name = min(rows, key=lambda name: state[name]["drawn"] / self._weights[name])
            row = next(rows[name], None)
            if row is None:
                del rows[name]
                continue
            drawn = state[name]["drawn"] + _amount(row)
            # A new dictionary each time: positions that were given out stay as they are.
            state = {**state, name: {"position": row.after, "drawn": drawn}}
            yield row._replace(after=state)


def _amount(row: Row) -> int:
    if row.tokens is not None:
        return _CHARACTERS_A_TOKEN * len(row.tokens)
    return len(row.text or "")
