"""Held-out micro-batches: every label once over all ranks, with the number of its document."""

import itertools
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading.held_out import HeldOutLoader, evenly_spaced
from data.tokenizer import Tokenizer
from tests.data.loading.loaders import FILES, TEXTS
from tokens import IGNORE_INDEX

LAYOUTS: dict[str, Any] = {
    "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=10),
    "seq_len": st.integers(1, 13),
    "world": st.integers(1, 3),
    "local": st.integers(1, 3),
}
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEF"


@settings(max_examples=60, deadline=None)
@given(
    **LAYOUTS,
    mask=st.booleans(),
    prefetch=st.sampled_from([0, 2]),
)
def test_labels_of_all_ranks_are_the_documents_tokens_by_number(
    byte_tokenizer: Tokenizer,
    list_source: Any,
    lengths: list[int],
    seq_len: int,
    world: int,
    local: int,
    mask: bool,
    prefetch: int,
) -> None:
    texts = [ALPHABET[:length] for length in lengths]
    ranks = [
        list(
            HeldOutLoader(
                list_source([texts]),
                byte_tokenizer,
                seq_len=seq_len,
                local_batch_size=local,
                dp_rank=rank,
                dp_world_size=world,
                mask_documents=mask,
                prefetch_batches=prefetch,
            )
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    found = defaultdict(list)
    for step in zip(*ranks, strict=True):
        assert len({batch.num_documents for batch in step}) == 1
        for batch in step:
            assert batch.documents.shape == batch.labels.shape == batch.inputs["input"].shape
            pairs = zip(batch.labels.flatten().tolist(), batch.documents.flatten().tolist(), strict=True)
            for label, number in pairs:
                assert 0 <= number < batch.num_documents
                if label != IGNORE_INDEX:
                    found[number].append(label)
    documents = [[*byte_tokenizer.encode(text), byte_tokenizer.end_of_document_id] for text in texts]
    expected = {n: tokens if n and not mask else tokens[1:] for n, tokens in enumerate(documents)}
    assert found == expected
    if mask:
        # its labels are in several rows; micro-batches of a rank are rows of T labels
        rows: dict[int, set[Any]] = defaultdict(set)
        for place in itertools.product(range(len(ranks[0])), range(world), range(local)):
            step, rank, row = place
            labels = ranks[rank][step].labels.reshape(local, seq_len)[row]
            numbers = ranks[rank][step].documents.reshape(local, seq_len)[row]
            for number in numbers[labels != IGNORE_INDEX].tolist():
                rows[number].add(place)
        assert ranks[0][-1].num_cut_documents == sum(len(each) > 1 for each in rows.values())


@settings(max_examples=60, deadline=None)
@given(
    **LAYOUTS,
    max_tokens=st.integers(1, 300),
)
def test_a_limit_takes_evenly_spaced_rows_of_those_without_it_on_any_number_of_ranks(
    byte_tokenizer: Tokenizer,
    list_source: Any,
    lengths: list[int],
    seq_len: int,
    world: int,
    local: int,
    max_tokens: int,
) -> None:
    source = list_source([[ALPHABET[:length] for length in lengths]])

    def rows(world: int, local: int, max_tokens: int | None) -> list[tuple[Any, ...]]:
        sizes: dict[str, Any] = {"seq_len": seq_len, "local_batch_size": local, "max_tokens": max_tokens}
        ranks = [
            list(HeldOutLoader(source, byte_tokenizer, dp_rank=rank, dp_world_size=world, **sizes))
            for rank in range(world)
        ]
        found = [
            tuple(tuple(part[row].tolist()) for part in parts)
            for step in zip(*ranks, strict=True)
            for row in range(local)
            for batch in step
            for parts in [
                [x.reshape(local, seq_len) for x in (batch.inputs["input"], batch.labels, batch.documents)]
            ]
        ]
        # without rows of padding, or with no label, which come last on each rank
        return sorted(each for each in found if any(label != IGNORE_INDEX for label in each[1]))

    whole = rows(1, 1, None)
    num_rows = -(-(sum(length + 1 for length in lengths) - 1) // seq_len)
    in_order = [
        (tuple(batch.inputs["input"][0].tolist()), tuple(batch.labels[0].tolist()), batch.documents[0])
        for batch in HeldOutLoader(source, byte_tokenizer, seq_len=seq_len, local_batch_size=1)
    ]
    assert len(in_order) == num_rows
    chosen = evenly_spaced(num_rows, -(-max_tokens // seq_len))
    wanted = [
        (ids, labels, tuple(numbers.tolist()))
        for (ids, labels, numbers), is_chosen in zip(in_order, chosen, strict=True)
        if is_chosen and any(label != IGNORE_INDEX for label in labels)
    ]
    assert rows(world, local, max_tokens) == sorted(wanted)
    if max_tokens >= sum(length + 1 for length in lengths):
        assert sorted(wanted) == whole


@given(num_rows=st.integers(0, 400), max_rows=st.integers(1, 400))
def test_rows_are_at_even_distances(num_rows: int, max_rows: int) -> None:
    chosen = evenly_spaced(num_rows, max_rows)
    assert (len(chosen), chosen.sum()) == (num_rows, min(num_rows, max_rows))
    if num_rows > max_rows:
        places = chosen.nonzero()[0]
        distance = num_rows / max_rows
        gaps = [places[0] + num_rows - places[-1], *(places[1:] - places[:-1])]
        assert max(abs(gap - distance) for gap in gaps) < 1
        # as far from the start as from the end
        assert abs(places[0] - (num_rows - 1 - places[-1])) <= 1


def test_skipped_rows_have_no_number_and_an_iterator_starts_anew(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    loader = HeldOutLoader(list_source(FILES), byte_tokenizer, seq_len=8, local_batch_size=2)
    next(iter(loader))
    for _ in range(2):
        *_, last = loader
        assert last.num_documents == len(TEXTS)


def test_an_error_of_the_source_reaches_the_consumer(byte_tokenizer: Tokenizer, list_source: Any) -> None:
    source = list_source(FILES, damaged_at=(2, 3))
    for prefetch in (0, 2):
        loader = HeldOutLoader(
            source, byte_tokenizer, seq_len=8, local_batch_size=1, prefetch_batches=prefetch
        )
        with pytest.raises(ValueError, match="is damaged at row 3"):
            list(itertools.islice(loader, 1000))
