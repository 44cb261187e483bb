"""Held-out micro-batches: every label once over all ranks, with the number of its document."""

import itertools
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading.held_out import HeldOutLoader
from data.tokenizer import Tokenizer
from tests.data.loading.loaders import FILES, TEXTS
from tokens import IGNORE_INDEX

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEF"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    seq_len=st.integers(1, 13),
    world=st.integers(1, 3),
    local=st.integers(1, 3),
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
