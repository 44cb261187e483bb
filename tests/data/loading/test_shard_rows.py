"""Rows laid out from document lengths alone, against the packers that read documents one by one."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import ShardsSource, Split
from data.loading.best_fit import pack_block
from data.loading.layout import RowLayout, best_fit_layout, concatenated_layout
from data.loading.packing import ConcatenatePacker, Document, PackedRow, PackerState, RowBlock
from data.loading.shard_rows import Packing, ShardRows
from data.shards.prepare import PrepareOptions, prepare
from data.sources.shards import DocumentChunk, ShardDocuments
from data.tokenizer import Tokenizer

START = PackerState(None, 0, {})


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that a short epoch has many."""
    monkeypatch.setattr("data.loading.shard_rows.BLOCK_ROWS", 5)


@pytest.fixture(scope="session")
def folder(list_source: Any, byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 prepared documents of 2 to 78 tokens."""
    path = tmp_path_factory.mktemp("shard_rows")
    texts = [f"{index} " + "abcdefghijk" * (index * index % 8) for index in range(120)]
    prepare(path, list_source([texts]), byte_tokenizer, PrepareOptions(shard_tokens=500))
    return path


def documents_of(
    folder: Path, tokenizer: Tokenizer, seed: int | None, split: Split = "all"
) -> ShardDocuments:
    source = ShardsSource(folder=str(folder))
    return ShardDocuments(source, tokenizer_fingerprint=tokenizer.fingerprint, split=split, shuffle_seed=seed)


def pieces(rows: Sequence[PackedRow]) -> list[list[tuple[int, int, int]]]:
    """First stored token of the document, start and stop of each row's segments."""
    return [[(first_token(each.tokens), each.start, each.stop) for each in row.segments] for row in rows]


def first_token(tokens: Any) -> int:
    """Index of a stored document's first token, which identifies it."""
    return tokens._start


def rows_of(blocks: Sequence[RowBlock]) -> list[PackedRow]:
    return [block.rows[index] for block in blocks for index in range(len(block.rows))]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    seq_len=st.integers(1, 20),
    offset=st.integers(0, 49),
)
def test_the_concatenated_layout_has_the_rows_of_the_packer(
    lengths: list[int], seq_len: int, offset: int
) -> None:
    offset = min(offset, lengths[0] - 1)
    num_rows = (sum(lengths) - offset - 1) // seq_len
    layout = concatenated_layout(np.array(lengths), offset, num_rows, seq_len) if num_rows else None
    tokens = [np.full(length, index) for index, length in enumerate(lengths)]
    documents = [
        Document(tokens=each, position={"at": index}, next_position={"at": index + 1}, skipped={})
        for index, each in enumerate(tokens)
    ]
    packer = ConcatenatePacker(seq_len, 0)
    packed = [row for row, _ in packer.pack(documents, PackerState({"at": 0}, offset, {}))][:num_rows]
    expected = [[(int(each.tokens[:1][0]), each.start, each.stop) for each in row.segments] for row in packed]
    assert (_rows(layout) if layout else []) == expected


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), seq_len=st.integers(1, 20))
def test_the_best_fit_layout_has_the_rows_of_a_block(lengths: list[int], seq_len: int) -> None:
    layout = best_fit_layout(np.array(lengths), seq_len)
    assert _rows(layout) == [[tuple(span) for span in row] for row in pack_block(lengths, seq_len)]


def _rows(layout: RowLayout) -> list[list[tuple[int, int, int]]]:
    columns = zip(layout.documents.tolist(), layout.starts.tolist(), layout.stops.tolist(), strict=True)
    flat = list(columns)
    return [flat[first:stop] for first, stop in itertools.pairwise(layout.firsts.tolist())]


@pytest.mark.parametrize("seq_len", [1, 3, 16, 40, 5000])
@pytest.mark.parametrize("seed", [None, 4])
def test_concatenated_rows_of_shards_are_those_of_the_stream_of_documents(
    folder: Path, byte_tokenizer: Tokenizer, small_blocks: None, seq_len: int, seed: int | None
) -> None:
    source = documents_of(folder, byte_tokenizer, seed)
    rows = ShardRows(source, packing="concatenate", seq_len=seq_len, padding_id=0)
    num_rows = max(3 * source.num_tokens // seq_len, 12)
    blocks = []
    while sum(len(block.rows) for block in blocks) < num_rows:
        blocks = list(itertools.islice(rows.blocks(START), 2 * len(blocks) + 1))
    found = [row.tokens.tolist() for row in rows_of(blocks)][:num_rows]
    documents = itertools.islice(source.read(repeat=True), 120 * (5 + 13 * seq_len // source.num_tokens))
    stream = np.concatenate([row.tokens[:] for row in documents if row.tokens is not None]).tolist()
    assert found == [stream[row * seq_len : (row + 1) * seq_len + 1] for row in range(num_rows)]


@pytest.mark.parametrize("seq_len", [1, 7, 16, 33])
def test_an_epoch_ends_with_the_row_in_which_its_last_token_is_a_label(
    folder: Path, byte_tokenizer: Tokenizer, small_blocks: None, seq_len: int
) -> None:
    source = documents_of(folder, byte_tokenizer, 4)
    rows = ShardRows(source, packing="concatenate", seq_len=seq_len, padding_id=0)
    num_rows, ends = 0, []
    for block in rows.blocks(START):
        num_rows += len(block.rows)
        if block.ends_epoch:
            ends.append(num_rows)
        if len(ends) == 4:
            break
    # the last token of epoch e has index e * N - 1 in the stream
    assert ends == [-(-(epoch * source.num_tokens - 1) // seq_len) for epoch in (1, 2, 3, 4)]


@pytest.mark.parametrize("seq_len", [7, 16, 40, 5000])
def test_best_fit_rows_of_an_epoch_hold_each_document_once_and_no_other_epoch(
    folder: Path, byte_tokenizer: Tokenizer, small_blocks: None, seq_len: int
) -> None:
    source = documents_of(folder, byte_tokenizer, 4)
    blocks = ShardRows(source, packing="best_fit", seq_len=seq_len, padding_id=0).blocks(START)
    orders = []
    for _ in range(3):
        held: list[tuple[int, int]] = []
        for block in blocks:
            for row in pieces(rows_of([block])):
                held += [
                    (document, label) for document, start, stop in row for label in range(start + 1, stop)
                ]
            if block.ends_epoch:
                break
        stored = [source.tokens(number) for number in range(source.num_documents)]
        labels = [(first_token(each), label) for each in stored for label in range(1, len(each))]
        assert sorted(held) == sorted(labels)
        orders.append(held)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_blocks_resume_from_the_state_after_any_block(
    folder: Path, byte_tokenizer: Tokenizer, small_blocks: None, packing: Packing
) -> None:
    source = documents_of(folder, byte_tokenizer, 4)
    rows = ShardRows(source, packing=packing, seq_len=16, padding_id=0)
    blocks = list(itertools.islice(rows.blocks(START), 100))
    assert sum(block.ends_epoch for block in blocks) >= 2
    for index in range(90):
        again = list(itertools.islice(rows.blocks(blocks[index].next), 4))
        expected = blocks[index + 1 : index + 5]
        assert [pieces(rows_of([block])) for block in again] == [
            pieces(rows_of([block])) for block in expected
        ]
        assert [(block.next, block.ends_epoch) for block in again] == [
            (block.next, block.ends_epoch) for block in expected
        ]


def test_blocks_of_an_epoch_know_roughly_how_many_rows_are_left(
    folder: Path, byte_tokenizer: Tokenizer, small_blocks: None
) -> None:
    source = documents_of(folder, byte_tokenizer, 4)
    blocks = ShardRows(source, packing="concatenate", seq_len=16, padding_id=0).blocks(START)
    epoch = list(itertools.islice(blocks, 1 + source.num_tokens // 16 // 5))
    num_rows = list(itertools.accumulate(len(block.rows) for block in epoch))
    for before, block in zip(num_rows, epoch, strict=True):
        if not block.ends_epoch:
            assert block.rows_left == pytest.approx(source.num_tokens / 16 - before, abs=20)


@pytest.mark.parametrize("packing", get_args(Packing))
def test_a_row_of_many_epochs_reads_no_more_documents_than_it_holds(
    packing: Packing, list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(tmp_path, list_source([["short"]]), byte_tokenizer, PrepareOptions())
    source = documents_of(tmp_path, byte_tokenizer, 0)
    num_read = 0
    chunks = source.chunks

    def counted(*arguments: Any, **options: Any) -> Iterator[DocumentChunk]:
        nonlocal num_read
        for chunk in chunks(*arguments, **options):
            num_read += 1
            yield chunk

    source.chunks = counted
    blocks = ShardRows(source, packing=packing, seq_len=60, padding_id=0).blocks(START)
    for number, block in enumerate(itertools.islice(blocks, 20), 1):
        assert len(block.rows) == 1
        # a row of 60 tokens and its last label are of eleven documents of six tokens, and share the last one
        per_row = 10 if packing == "concatenate" else 1
        assert num_read <= number * per_row + 2


def test_a_row_length_below_one_is_rejected(folder: Path, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="seq_len is 0"):
        ShardRows(documents_of(folder, byte_tokenizer, 4), packing="best_fit", seq_len=0, padding_id=0)


def test_an_offset_beyond_its_document_is_rejected(folder: Path, byte_tokenizer: Tokenizer) -> None:
    rows = ShardRows(documents_of(folder, byte_tokenizer, 4), packing="concatenate", seq_len=8, padding_id=0)
    with pytest.raises(ValueError, match="the shards changed since the checkpoint"):
        next(rows.blocks(PackerState({"epoch": 0, "place": 3}, 1000, {})))
