"""The "mixture" source: several sources interleaved by weight, each repeating at its own rate.

The next row comes from the source that is furthest behind its weight: the one with the least text read so far
divided by its weight. Every source's proportion is thus exact to within about one document of each source,
without random numbers, and a position is each source's position and its amount of text.
"""

from collections.abc import Iterator, Mapping

from data.fingerprint import join_parts, parts_of
from data.sources.base import DocumentSource, Position, Row

# to weigh shards against text: English text has about 4.5 characters per token
_CHARACTERS_PER_TOKEN = 4


class MixtureDocuments:
    """Documents of several sources in the proportions of their weights.

    Args:
        sources: By name; the order does not matter.
        weights: Weight of each source, by the same names.
    """

    def __init__(self, sources: Mapping[str, DocumentSource], weights: Mapping[str, float]) -> None:
        self._sources = dict(sorted(sources.items()))
        self._weights = weights

    def __str__(self) -> str:
        return "mixture of " + ", ".join(f"{name} ({source})" for name, source in self._sources.items())

    @property
    def fingerprint(self) -> str:
        """The sources' fingerprints and their weights."""
        sources = {name: parts_of(source.fingerprint) for name, source in self._sources.items()}
        return join_parts({"weights": dict(self._weights), "sources": sources})

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield rows in order from a position.

        Args:
            position: A row's `next_position`; None for the start.
            repeat: Whether each source repeats. If not, an exhausted source is left out, and the mixture ends
                with the last one.

        Raises:
            UserError: A source cannot be read, or a whole epoch of one holds no document.
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
            drawn = state[name]["drawn"] + _num_characters(row)
            # a new dictionary per row: positions already yielded must not change
            state = {**state, name: {"position": row.next_position, "drawn": drawn}}
            yield row._replace(next_position=state)

    def progress(self, position: Position | None) -> float:
        """Return the mean over the sources of the fraction of each that precedes a position."""
        found = [
            source.progress(None if position is None else position[name]["position"])
            for name, source in self._sources.items()
        ]
        return sum(found) / len(found)


def _num_characters(row: Row) -> int:
    if row.tokens is not None:
        return _CHARACTERS_PER_TOKEN * len(row.tokens)
    return len(row.text or "")
