from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Document, PackedRow, RowPacker, collate, filler_row

END = 0
LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=12)


def _documents(lengths: Sequence[int]) -> list[Document]:
    """Documents whose tokens are all different, each closed by END."""
    documents = []
    first = 1
    for row, length in enumerate(lengths):
        tokens = np.array([*range(first, first + length - 1), END], dtype=np.int32)
        documents.append(Document(tokens=tokens, epoch=0, file=0, row=row, skipped={}))
        first += length
    return documents


def _pack(documents: Sequence[Document], seq_len: int) -> list[PackedRow]:
    packer = RowPacker(seq_len)
    rows: list[PackedRow] = []
    for document in documents:
        packer.add(document)
        while (row := packer.pop()) is not None:
            rows.append(row)
    last = packer.flush(END)
    return rows if last is None else [*rows, last]


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17))
def test_each_token_but_the_first_is_a_label_once_and_in_order(lengths: list[int], seq_len: int) -> None:
    documents = _documents(lengths)
    stream = np.concatenate([document.tokens for document in documents])
    rows = _pack(documents, seq_len)
    inputs: list[int] = []
    labels: list[int] = []
    for row in rows:
        batch, targets = collate([row], mask_documents=False)
        kept = targets[0] != -100
        inputs += batch["input"][0][kept].tolist()
        labels += targets[0][kept].tolist()
    assert inputs == stream[:-1].tolist()
    assert labels == stream[1:].tolist()


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), num_rows=st.integers(1, 4))
def test_masking_ignores_only_the_first_token_of_each_document(
    lengths: list[int], seq_len: int, num_rows: int
) -> None:
    documents = _documents(lengths)
    rows = _pack(documents, seq_len)
    rows += [filler_row(seq_len, END)] * (-len(rows) % num_rows)
    labels: list[int] = []
    for first in range(0, len(rows), num_rows):
        batch, targets = collate(rows[first : first + num_rows], mask_documents=True)
        assert batch["input"].shape == targets.shape == (1, num_rows * seq_len)
        labels += targets[targets != -100].tolist()
    assert labels == [int(token) for document in documents for token in document.tokens[1:]]


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), num_rows=st.integers(1, 4))
def test_cu_seqlens_are_exactly_the_document_and_row_bounds(
    lengths: list[int], seq_len: int, num_rows: int
) -> None:
    rows = [row for row in _pack(_documents(lengths), seq_len) if row.num_tokens == seq_len + 1]
    for first in range(0, len(rows) - num_rows + 1, num_rows):
        batch, _ = collate(rows[first : first + num_rows], mask_documents=True)
        flat, bounds = batch["input"][0].tolist(), batch["cu_seqlens"].tolist()
        after_end = {index + 1 for index, token in enumerate(flat) if token == END}
        row_bounds = set(range(0, num_rows * seq_len + 1, seq_len))
        assert bounds == sorted(after_end | row_bounds)
        assert batch["cu_seqlens"].dtype == torch.int32


def test_a_worked_example() -> None:
    documents = [[11, 12, END], [21, END], [31, 32, 33, 34, END]]
    packed = _pack(
        [
            Document(tokens=np.array(tokens, dtype=np.int32), epoch=0, file=0, row=row, skipped={})
            for row, tokens in enumerate(documents)
        ],
        4,
    )
    batch, labels = collate(packed, mask_documents=True)
    # Stream: 11 12 END 21 | END 31 32 33 | 34 END; row 1 begins with the END that ends document 1.
    assert batch["input"].tolist() == [[11, 12, END, 21, END, 31, 32, 33, 34, END, END, END]]
    assert labels.tolist() == [[12, END, -100, END, -100, 32, 33, 34, END, -100, -100, -100]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 5, 8, 10, 12]
    plain, labels = collate(packed, mask_documents=False)
    assert "cu_seqlens" not in plain
    assert plain["input"].tolist() == [[11, 12, END, 21], [END, 31, 32, 33], [34, END, END, END]]
    assert labels.tolist() == [[12, END, 21, END], [31, 32, 33, 34], [END, -100, -100, -100]]


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17))
def test_each_row_says_where_the_next_one_begins(lengths: list[int], seq_len: int) -> None:
    rows = _pack(_documents(lengths), seq_len)
    for row, following in pairwise(rows):
        assert row.next_document is not None
        assert row.next_document.tokens[row.next_offset] == row.tokens[-1] == following.tokens[0]


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17))
def test_packing_from_where_a_row_begins_gives_the_same_rows(lengths: list[int], seq_len: int) -> None:
    documents = _documents(lengths)
    rows = _pack(documents, seq_len)
    for index, row in enumerate(rows[:-1]):
        assert row.next_document is not None
        packer = RowPacker(seq_len)
        packer.add(row.next_document, offset=row.next_offset)
        for document in documents[row.next_document.row + 1 :]:
            packer.add(document)
        again = packer.pop()
        if again is not None:
            assert again.tokens.tolist() == rows[index + 1].tokens.tolist()
            assert again.starts == rows[index + 1].starts


def test_padding_after_a_full_row_is_one_document_of_its_own() -> None:
    rows = _pack(_documents([3, 2]), 8)
    batch, labels = collate(rows, mask_documents=True)
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert labels.tolist() == [[2, END, -100, END, -100, -100, -100, -100]]


@pytest.mark.parametrize("seq_len", [0, -1])
def test_a_sequence_length_below_one_is_refused(seq_len: int) -> None:
    with pytest.raises(ValueError, match=f"seq_len is {seq_len}, must be at least 1"):
        RowPacker(seq_len)
