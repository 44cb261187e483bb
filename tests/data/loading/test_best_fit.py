from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading.best_fit import BestFitPacker, best_fit_decreasing
from data.loading.packing import Document, Mark, PackedRow, collate
from data.tokenizer import Tokenizer

END = 0
START = Mark(None, 0, {})
CORPUS = Path(__file__).parents[3] / "../shared/data/corpus"
QWEN3 = Path(__file__).parents[3] / "../shared/data/qwen3_tokenizer"
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def _documents(lengths: Sequence[int]) -> list[Document]:
    """Documents whose tokens are all different, each closed by END."""
    documents = []
    first = 1
    for row, length in enumerate(lengths):
        tokens = np.array([*range(first, first + length - 1), END], dtype=np.int32)
        before = {"row": row} if row else None
        documents.append(Document(tokens=tokens, before=before, after={"row": row + 1}, skipped={}))
        first += length
    return documents


def _pack(lengths: Sequence[int], seq_len: int) -> list[PackedRow]:
    return [row for row, _ in BestFitPacker(seq_len, END).pack(_documents(lengths), START)]


def _waste(rows: Sequence[PackedRow]) -> float:
    return 1 - sum(row.num_tokens for row in rows) / sum(row.seq_len + 1 for row in rows)


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_bins_hold_every_item_once_and_no_more_than_fits(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(item for each in bins for item in each) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in each) <= 20 for each in bins)
    # No two bins could be one.
    loads = sorted(sum(lengths[item] for item in each) for each in bins)
    assert len(bins) < 2 or loads[0] + loads[1] > 20


def test_a_worked_example() -> None:
    # 7 + 3, 6 + 4, 5 + 5: the least space that fits, where first fit would open a fourth bin.
    bins = best_fit_decreasing([4, 5, 3, 7, 5, 6], 10)
    assert sorted(sorted(each) for each in bins) == [[0, 5], [1, 4], [2, 3]]


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), block=st.integers(1, 5))
def test_each_token_but_a_documents_first_is_a_label_once_and_padding_never(
    lengths: list[int], seq_len: int, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.loading.best_fit.BLOCK_ROWS", block)
        rows = _pack(lengths, seq_len)
    labels: list[int] = []
    for row in rows:
        batch, targets = collate([row], mask_documents=True)
        labels += targets[targets != -100].tolist()
        bounds = batch["cu_seqlens"].tolist()
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == seq_len
        # Padding is a document of its own.
        assert row.num_tokens >= seq_len or row.num_tokens in bounds
    tokens = [
        token for document in _documents(lengths) for token in document.tokens.__getitem__(slice(1, None))
    ]
    assert sorted(labels) == sorted(map(int, tokens))


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(3, 17))
def test_only_documents_longer_than_a_row_are_cut_where_padding_does_not_matter(
    lengths: list[int], seq_len: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.loading.best_fit.MAX_PADDING", 1.0)
        rows = _pack(lengths, seq_len)
    for row in rows:
        for tokens, first, last in row.pieces:
            assert len(tokens) > seq_len + 1 or (first, last) == (0, len(tokens))
            assert last - first >= min(2, len(tokens))


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), block=st.integers(1, 4))
def test_packing_from_the_mark_of_a_row_gives_the_rows_after_it(
    lengths: list[int], seq_len: int, block: int
) -> None:
    documents = _documents(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.loading.best_fit.BLOCK_ROWS", block)
        packer = BestFitPacker(seq_len, END)
        packed = list(packer.pack(documents, START))
        for index, (_, mark) in enumerate(packed, 1):
            assert mark is not None
            first = 0 if mark.position is None else mark.position["row"]
            again = [row.tokens.tolist() for row, _ in packer.pack(documents[first:], mark)]
            assert again == [row.tokens.tolist() for row, _ in packed[index:]]


def test_a_mark_beyond_its_block_is_refused() -> None:
    packer = BestFitPacker(8, END)
    with pytest.raises(ValueError, match=r"is row 5 of the block at None, but the block has 1 rows"):
        next(packer.pack(_documents([5]), Mark(None, 5, {})))
    assert packer.name != BestFitPacker(9, END).name, "blocks depend on the length of rows"
    with pytest.raises(ValueError, match="seq_len is 0, must be at least 1"):
        BestFitPacker(0, END)


def test_rows_do_not_come_in_the_order_of_length() -> None:
    rng = np.random.default_rng(0)
    rows = _pack(np.minimum(rng.lognormal(3, 1.2, 4000).astype(int) + 2, 500).tolist(), 128)
    longest = [max(last - first for _, first, last in row.pieces) for row in rows[:400]]
    assert abs(np.corrcoef(longest, np.arange(400))[0, 1]) < 0.15


@pytest.mark.skipif(not (CORPUS.is_dir() and QWEN3.is_dir()), reason="the corpus is not here")
@pytest.mark.parametrize("seq_len", [1024, 2048, 4096])
def test_less_than_1_percent_of_real_documents_rows_is_padding(seq_len: int) -> None:
    tokenizer = Tokenizer.load(QWEN3)
    texts = pq.read_table(CORPUS / "validation.parquet", columns=["content"]).column(0).to_pylist()
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
    # As many documents as a few blocks take, in the corpus' own proportions.
    rng = np.random.default_rng(1)
    sample = rng.choice(lengths, size=5 * 512 * seq_len // int(np.mean(lengths))).tolist()
    rows = _pack(sample, seq_len)
    assert 0 <= _waste(rows) <= 0.01
    num_cuts = sum(1 for row in rows for _, first, _ in row.pieces if first > 0)
    needed = sum((length - 2) // seq_len for length in sample)
    assert num_cuts - needed <= 0.02 * len(sample), "few documents that fit into a row are cut"


HOSTILE = {
    "all just above half a row": lambda rng: rng.integers(66, 90, 3000),
    "all a row less a little": lambda rng: rng.integers(110, 125, 3000),
    "all of one length": lambda rng: np.full(3000, 100),
    "long ones only": lambda rng: rng.integers(129, 5000, 300),
    "one after the other": lambda rng: np.tile([70, 129, 3], 1500),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_lengths_leave_more_than_1_percent_of_padding(name: str) -> None:
    lengths = HOSTILE[name](np.random.default_rng(3)).tolist()
    # The last block may be smaller than one row in a hundred.
    lengths += [1] * (-sum(lengths) % (512 * 128))
    rows = _pack(lengths, 128)
    assert _waste(rows) <= 0.0105
    kept = sum(row.num_tokens for row in rows)
    assert kept >= sum(lengths)
    assert kept - sum(lengths) == sum(1 for row in rows for _, first, _ in row.pieces if first > 0)
