import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import MixtureSource, TextSource
from data.sources.base import Row
from data.sources.mixture import MixtureDocuments

WEB = [[f"web {index} " + "x" * (index % 7) for index in range(9)], [None, "web last"]]
BOOKS = [["books 0 " + "y" * 30, "", "books 1"]]


def _mix(list_source: Any, weights: dict[str, float], seed: int | None = None) -> MixtureDocuments:
    sources = {"web": list_source(WEB, shuffle_seed=seed), "books": list_source(BOOKS, shuffle_seed=seed)}
    return MixtureDocuments(sources, weights)


@settings(max_examples=20, deadline=None)
@given(web=st.floats(0.05, 20.0), books=st.floats(0.05, 20.0))
def test_each_source_has_its_proportion_of_the_text_to_within_a_document(
    list_source: Any, web: float, books: float
) -> None:
    drawn = {"web": 0, "books": 0}
    for row in itertools.islice(_mix(list_source, {"web": web, "books": books}).read(repeat=True), 300):
        if row.text is None:
            continue
        drawn[row.text.partition(" ")[0]] += len(row.text)
        total = sum(drawn.values())
        # at most one document of each source ahead or behind
        assert abs(drawn["web"] - total * web / (web + books)) <= 40 * 2


class _TokenDocuments:
    """A source of documents as tokens, like shards."""

    fingerprint = "tokens"

    def read(self, position: Any = None, *, repeat: bool) -> Iterator[Row]:
        for number in itertools.count():
            yield Row(tokens=np.zeros(10, dtype=np.int32), next_position={"n": number})

    def progress(self, position: Any) -> float:
        return 0.0


def test_a_token_of_shards_weighs_four_characters_of_text(list_source: Any) -> None:
    text = list_source([["x" * 40] * 9])
    mixture = MixtureDocuments({"text": text, "shards": _TokenDocuments()}, {"text": 3.0, "shards": 1.0})
    rows = list(itertools.islice(mixture.read(repeat=True), 400))
    # documents of 40 characters and of 10 tokens count the same: 3 of 4 are text
    assert sum(row.text is not None for row in rows) == 300


def test_each_source_repeats_at_its_own_rate(list_source: Any) -> None:
    mixture = _mix(list_source, {"web": 1.0, "books": 5.0})
    rows = list(itertools.islice(mixture.read(repeat=True), 200))
    counts = Counter(row.text for row in rows if row.text)
    web = [counts[text] for text in itertools.chain(*WEB) if text]
    books = [counts[text] for text in BOOKS[0] if text]
    assert max(web) - min(web) <= 1, "documents of a source are read equally often"
    assert max(books) - min(books) <= 1
    assert min(books) > 2 * max(web)
    epochs = rows[-1].next_position
    assert epochs["books"]["position"]["epoch"] > epochs["web"]["position"]["epoch"]


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize("repeat", [True, False])
def test_reading_resumes_from_every_position(list_source: Any, seed: int | None, repeat: bool) -> None:
    mixture = _mix(list_source, {"web": 0.3, "books": 0.7}, seed)
    whole = list(itertools.islice(mixture.read(repeat=repeat), 60))
    assert len(whole) == (60 if repeat else 14)
    positions = [json.dumps(row.next_position) for row in whole]
    for index, position in enumerate(positions, 1):
        rest = mixture.read(json.loads(position), repeat=repeat)
        assert list(itertools.islice(rest, len(whole) - index)) == whole[index:]
    assert [json.dumps(row.next_position) for row in whole] == positions, "yielded positions do not change"


def test_one_epoch_reads_every_document_once(list_source: Any) -> None:
    rows = _mix(list_source, {"web": 1.0, "books": 9.0}).read(repeat=False)
    texts = sorted(text for text in itertools.chain(*WEB, *BOOKS) if text)
    assert sorted(row.text for row in rows if row.text) == texts


def test_the_order_of_the_sources_does_not_matter(list_source: Any) -> None:
    sources = {"web": list_source(WEB), "books": list_source(BOOKS)}
    first = MixtureDocuments(sources, {"web": 1.0, "books": 2.0})
    second = MixtureDocuments(dict(reversed(sources.items())), {"books": 2.0, "web": 1.0})
    third = MixtureDocuments(sources, {"web": 1.0, "books": 2.5})
    assert first.fingerprint == second.fingerprint != third.fingerprint
    assert list(first.read(repeat=False)) == list(second.read(repeat=False))


def test_weights_must_match_the_sources_and_be_positive() -> None:
    sources: Any = {"web": TextSource(folder="a"), "books": TextSource(folder="b")}
    with pytest.raises(ValueError, match=r"weights of a mixture names \['book', 'web'\]"):
        MixtureSource(weights={"web": 1.0, "book": 1.0}, sources=sources)
    with pytest.raises(ValueError, match=r"weights\.web of a mixture is 0"):
        MixtureSource(weights={"web": 0.0, "books": 1.0}, sources=sources)
