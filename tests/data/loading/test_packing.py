from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading.packing import ConcatenatePacker, Document, PackedRow, PackerState, collate, padding_row

END = 0
START = PackerState(None, 0, {})
LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=12)


def _documents(lengths: Sequence[int]) -> list[Document]:
    """Documents of distinct tokens, each ending with END."""
    documents = []
    first = 1
    for row, length in enumerate(lengths):
        tokens = np.array([*range(first, first + length - 1), END], dtype=np.int32)
        documents.append(_document(tokens, row))
        first += length
    return documents


def _document(tokens: np.ndarray, row: int) -> Document:
    return Document(
        tokens=tokens, position={"row": row} if row else None, next_position={"row": row + 1}, skipped={}
    )


def _pack(documents: Sequence[Document], seq_len: int) -> list[PackedRow]:
    return [row for row, _ in ConcatenatePacker(seq_len, END).pack(documents, START)]


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17))
def test_each_token_but_the_first_is_a_label_once_and_in_order(lengths: list[int], seq_len: int) -> None:
    documents = _documents(lengths)
    stream = np.concatenate([document.tokens[:] for document in documents])
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
    rows += [padding_row(seq_len, END)] * (-len(rows) % num_rows)
    labels: list[int] = []
    for first in range(0, len(rows), num_rows):
        batch, targets = collate(rows[first : first + num_rows], mask_documents=True)
        assert batch["input"].shape == targets.shape == (1, num_rows * seq_len)
        labels += targets[targets != -100].tolist()
    assert labels == [int(token) for document in documents for token in document.tokens[1:]]


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), num_rows=st.integers(1, 4))
def test_cu_seqlens_are_the_document_and_row_boundaries(
    lengths: list[int], seq_len: int, num_rows: int
) -> None:
    rows = [row for row in _pack(_documents(lengths), seq_len) if row.num_tokens == seq_len + 1]
    for first in range(0, len(rows) - num_rows + 1, num_rows):
        batch, _ = collate(rows[first : first + num_rows], mask_documents=True)
        flat, boundaries = batch["input"][0].tolist(), batch["cu_seqlens"].tolist()
        documents = {index + 1 for index, token in enumerate(flat) if token == END}
        row_boundaries = set(range(0, num_rows * seq_len + 1, seq_len))
        assert boundaries == sorted(documents | row_boundaries)
        assert batch["cu_seqlens"].dtype == torch.int32


def test_a_last_token_that_is_the_last_label_already_makes_no_row() -> None:
    for num_tokens, num_rows in ((8, 2), (9, 2), (10, 3)):
        assert len(_pack(_documents([num_tokens]), 4)) == num_rows


def test_a_worked_example() -> None:
    documents = [[11, 12, END], [21, END], [31, 32, 33, 34, END]]
    packed = _pack(
        [_document(np.array(tokens, dtype=np.int32), row) for row, tokens in enumerate(documents)],
        4,
    )
    batch, labels = collate(packed, mask_documents=True)
    # stream: 11 12 END 21 | END 31 32 33 | 34 END; row 1 starts with the END of document 1
    assert batch["input"].tolist() == [[11, 12, END, 21, END, 31, 32, 33, 34, END, END, END]]
    assert labels.tolist() == [[12, END, -100, END, -100, 32, 33, 34, END, -100, -100, -100]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 5, 8, 10, 12]
    plain, labels = collate(packed, mask_documents=False)
    assert "cu_seqlens" not in plain
    assert plain["input"].tolist() == [[11, 12, END, 21], [END, 31, 32, 33], [34, END, END, END]]
    assert labels.tolist() == [[12, END, 21, END], [31, 32, 33, 34], [END, -100, -100, -100]]


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17))
def test_packing_resumes_from_the_state_after_any_row(lengths: list[int], seq_len: int) -> None:
    documents = _documents(lengths)
    packer = ConcatenatePacker(seq_len, END)
    packed = list(packer.pack(documents, START))
    for index, (row, state) in enumerate(packed):
        if state is None:
            assert index == len(packed) - 1
            continue
        first = 0 if state.position is None else state.position["row"]
        assert documents[first].tokens[state.offset :][:1].tolist() == [row.tokens[-1]]
        again = [each.tokens.tolist() for each, _ in packer.pack(documents[first:], state)]
        assert again == [each.tokens.tolist() for each, _ in packed[index + 1 :]]


def test_a_state_of_other_documents_is_rejected() -> None:
    documents = _documents([5, 5])
    for state in (PackerState(None, 5, {}), PackerState({"row": 1}, 2, {})):
        with pytest.raises(ValueError, match="the files or the tokenizer changed since the checkpoint"):
            next(ConcatenatePacker(4, END).pack(documents, state))


def test_padding_is_a_document_of_its_own() -> None:
    rows = _pack(_documents([3, 2]), 8)
    batch, labels = collate(rows, mask_documents=True)
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert labels.tolist() == [[2, END, -100, END, -100, -100, -100, -100]]


@pytest.mark.parametrize("seq_len", [0, -1])
def test_a_sequence_length_below_one_is_rejected(seq_len: int) -> None:
    with pytest.raises(ValueError, match=f"seq_len is {seq_len}, must be at least 1"):
        ConcatenatePacker(seq_len, END)
