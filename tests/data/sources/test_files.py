"""Epochs over a list of files: order, filters, damage, and resuming from any position."""

import itertools
import json
import logging
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import ColumnOptions, TextOptions
from data.sources.base import Row
from data.sources.filters import SKIP_REASONS, Filter
from data.sources.split import is_held_out

ROWS = st.lists(st.lists(st.sampled_from(["text", None, ""]), max_size=9), min_size=1, max_size=5)


def _name_rows(files: list[list[str | None]]) -> list[list[str | None]]:
    """Make each text distinct, so that it can be counted."""
    return [
        [f"{index}-{row}" if value else value for row, value in enumerate(rows)]
        for index, rows in enumerate(files)
    ]


@settings(max_examples=60, deadline=None)
@given(files=ROWS, seed=st.one_of(st.none(), st.integers(0, 99)), block=st.integers(1, 6))
def test_every_document_is_read_once_per_epoch(
    list_source: Any, files: list[list[str | None]], seed: int | None, block: int
) -> None:
    files = _name_rows(files)
    texts = [text for rows in files for text in rows if text]
    if not texts:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.sources.files.BLOCK_ROWS", block)
        rows = list_source(files, shuffle_seed=seed).read(repeat=True)
        num_rows = sum(map(len, files))
        for epoch in range(3):
            in_epoch = list(itertools.islice(rows, num_rows))
            assert sorted(row.text for row in in_epoch if row.text) == sorted(texts)
            assert {row.next_position["epoch"] for row in in_epoch} == {epoch}


@settings(max_examples=40, deadline=None)
@given(files=ROWS, seed=st.one_of(st.none(), st.integers(0, 99)), block=st.integers(1, 6))
def test_reading_resumes_from_every_position(
    list_source: Any, files: list[list[str | None]], seed: int | None, block: int
) -> None:
    files = _name_rows(files)
    if not any(text for rows in files for text in rows):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.sources.files.BLOCK_ROWS", block)
        source = list_source(files, shuffle_seed=seed)
        num_rows = 2 * sum(map(len, files)) + 3
        whole = list(itertools.islice(source.read(repeat=True), num_rows))
        for index, row in enumerate(whole):
            position = json.loads(json.dumps(row.next_position))
            rest = list(itertools.islice(source.read(position, repeat=True), num_rows - index - 1))
            assert rest == whole[index + 1 :]


def test_epochs_and_seeds_have_different_orders(list_source: Any) -> None:
    files = [[f"{file}-{row}" for row in range(50)] for file in range(20)]
    texts = list(itertools.chain.from_iterable(files))

    def epochs(seed: int | None) -> list[list[str | None]]:
        rows = list_source(files, shuffle_seed=seed).read(repeat=True)
        return [[row.text for row in itertools.islice(rows, 1000)] for _ in range(2)]

    orders = [*epochs(1), *epochs(2)]
    assert epochs(1) == orders[:2], "the same seed gives the same order"
    assert epochs(None) == [texts, texts]
    assert len({tuple(order) for order in orders}) == 4
    # files are permuted, and rows within them
    firsts = [[text.partition("-")[0] for text in order[::50] if text] for order in orders]
    assert len({tuple(first) for first in firsts}) == 4
    assert orders[0][:50] not in files


def test_a_source_says_how_often_it_was_read(list_source: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    list(list_source([["a", "b"]]).read(repeat=False))
    list(itertools.islice(list_source([["a", "b"]], log_skipped=False).read(repeat=True), 20))
    assert caplog.records == []
    list(itertools.islice(list_source([["a", "b"]]).read(repeat=True), 2 * 17 + 1))
    assert [(record.levelname, record.message.partition(",")[0]) for record in caplog.records] == [
        ("INFO", "a list has been read once"),
        ("INFO", "a list has been read 2 times"),
        ("WARNING", "a list has been read 4 times"),
        ("WARNING", "a list has been read 8 times"),
        ("WARNING", "a list has been read 16 times"),
    ]
    # the logger whose progress a run prints
    assert {record.name for record in caplog.records} == {"parallax"}


def test_a_block_ends_with_the_row_that_reaches_its_size(
    list_source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.files.BLOCK_CHARACTERS", 10)
    source = list_source([["aaaa", "bbbb", "cccc", "dddd", "eeee"]], shuffle_seed=0)
    rows = [row.next_position["row"] for row in source.read(repeat=False)]
    assert rows == [0, 0, 3, 3, 5]


@pytest.mark.parametrize("seed", [None, 4])
def test_a_damaged_file_raises_with_its_name_or_its_rest_is_skipped(
    list_source: Any, seed: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    files = [["a", "b"], ["c", "d", "e"], ["f"]]
    with pytest.raises(ValueError, match="part-1 is damaged at row 1"):
        list(list_source(files, damaged_at=(1, 1), shuffle_seed=seed).read(repeat=False))
    source = list_source(
        files, damaged_at=(1, 1), shuffle_seed=seed, options=TextOptions(on_damaged_file="skip")
    )
    rows = list(itertools.islice(source.read(repeat=True), 10))
    assert Counter(row.text for row in rows) == dict.fromkeys(("a", "b", "c", "f", None), 2)
    assert [row.skipped for row in rows if row.text is None] == ["damaged_file"] * 2
    for index, row in enumerate(rows):
        assert (
            list(itertools.islice(source.read(row.next_position, repeat=True), 9 - index))
            == rows[index + 1 :]
        )
    assert "part-1 is damaged at row 1" in caplog.text
    assert "epoch 0 of a list: 4 documents, rows skipped: 1 damaged_file" in caplog.text


CASES: list[tuple[dict[str, Any], object, object, str | None]] = [
    ({}, None, None, "null"),
    ({}, " \n", None, "empty"),
    ({}, b"", None, "empty"),
    ({}, b"\xff", None, "not_text"),
    ({}, "half a pair \ud800", None, "not_text"),
    ({}, 3.5, None, "not_text"),
    ({}, "text", None, None),
    ({"min_score": 0.5}, "text", 0.5, None),
    ({"min_score": 0.5}, "text", 0.49, "low_score"),
    ({"min_score": 0.5}, "text", "0.7", None),
    ({"min_score": 0.5}, "text", "n/a", "bad_score"),
    ({"min_score": 0.5}, "text", None, "bad_score"),
    ({"min_score": 0.5}, "text", float("nan"), "bad_score"),
    ({"min_score": 0.5}, None, 0.1, "null"),
    ({"min_characters": 4, "max_characters": 4}, "text", None, None),
    ({"min_characters": 5}, "text", None, "too_short"),
    ({"max_characters": 3}, "text", None, "too_long"),
]


@pytest.mark.parametrize(("limits", "value", "score", "reason"), CASES)
def test_a_row_is_a_document_or_skipped_for_a_reason(
    limits: dict[str, Any], value: object, score: object, reason: str | None
) -> None:
    text, found = Filter(**limits).apply(value, score)
    assert found == reason
    assert (text is None) == (reason is not None)
    assert reason is None or reason in SKIP_REASONS


def test_documents_are_split_into_train_and_held_out_by_content(list_source: Any) -> None:
    texts = [f"document {index}" for index in range(2000)]

    def read(split: str) -> list[Row]:
        return list(list_source([texts], split=split).read(repeat=False))

    train, held_out = ([row.text for row in read(split) if row.text] for split in ("train", "held_out"))
    assert sorted([*train, *held_out]) == sorted(texts)
    assert all(map(is_held_out, held_out))
    assert 0.02 < len(held_out) / 2000 < 0.045
    assert Counter(row.skipped for row in read("train"))["held_out"] == len(held_out)
    # the split does not depend on the order of the documents
    assert [row.text for row in list_source([texts[::-1]], split="train").read(repeat=False) if row.text] == (
        train[::-1]
    )


@pytest.mark.parametrize(
    "limits", [{"min_characters": 5, "max_characters": 4}, {"min_characters": -1}, {"max_characters": 0}]
)
def test_contradicting_limits_are_rejected(limits: dict[str, int]) -> None:
    options: dict[str, Any] = {**limits}
    with pytest.raises(
        ValueError, match=r"min_characters (is 5 and|must be at least 0)|max_characters must be at least 1"
    ):
        TextOptions(**options)


def test_an_empty_column_name_is_rejected() -> None:
    with pytest.raises(ValueError, match="score_column"):
        ColumnOptions(score_column="")
