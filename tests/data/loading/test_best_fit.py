import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading.best_fit import BestFitPacker, Span, best_fit_decreasing, dissolve_emptiest
from data.loading.packing import Document, PackedRow, PackerState, collate

END = 0
START = PackerState(None, 0, {})
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def _documents(lengths: Sequence[int]) -> list[Document]:
    """Documents of distinct tokens, each ending with END."""
    documents = []
    first = 1
    for row, length in enumerate(lengths):
        tokens = np.array([*range(first, first + length - 1), END], dtype=np.int32)
        position = {"row": row} if row else None
        documents.append(
            Document(tokens=tokens, position=position, next_position={"row": row + 1}, skipped={})
        )
        first += length
    return documents


def _pack(lengths: Sequence[int], seq_len: int) -> list[PackedRow]:
    return [row for row, _ in BestFitPacker(seq_len, END).pack(_documents(lengths), START)]


def _padding_fraction(rows: Sequence[PackedRow]) -> float:
    return 1 - sum(row.num_tokens for row in rows) / sum(row.seq_len + 1 for row in rows)


@given(lengths=st.lists(st.integers(1, 20), max_size=40))
def test_every_item_is_in_one_bin_and_no_bin_overflows(lengths: list[int]) -> None:
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(item for each in bins for item in each) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in each) <= 20 for each in bins)
    # no two bins fit into one
    loads = sorted(sum(lengths[item] for item in each) for each in bins)
    assert len(bins) < 2 or loads[0] + loads[1] > 20


def test_a_worked_example() -> None:
    # 7 + 3, 6 + 4, 5 + 5: best fit, where first fit would open a fourth bin
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
        boundaries = batch["cu_seqlens"].tolist()
        assert boundaries == sorted(set(boundaries))
        assert boundaries[-1] == seq_len
        # padding is a document of its own
        assert row.num_tokens >= seq_len or row.num_tokens in boundaries
    tokens = [
        token for document in _documents(lengths) for token in document.tokens.__getitem__(slice(1, None))
    ]
    assert sorted(labels) == sorted(map(int, tokens))


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(3, 17))
def test_only_documents_longer_than_a_row_are_split_if_padding_is_not_limited(
    lengths: list[int], seq_len: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.loading.best_fit.MAX_PADDING", 1.0)
        rows = _pack(lengths, seq_len)
    for row in rows:
        for tokens, start, stop in row.segments:
            assert len(tokens) > seq_len + 1 or (start, stop) == (0, len(tokens))
            assert stop - start >= min(2, len(tokens))


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), block=st.integers(1, 4))
def test_packing_resumes_from_the_state_after_any_row(lengths: list[int], seq_len: int, block: int) -> None:
    documents = _documents(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.loading.best_fit.BLOCK_ROWS", block)
        packer = BestFitPacker(seq_len, END)
        packed = list(packer.pack(documents, START))
        for index, (_, state) in enumerate(packed, 1):
            assert state is not None
            first = 0 if state.position is None else state.position["row"]
            again = [row.tokens.tolist() for row, _ in packer.pack(documents[first:], state)]
            assert again == [row.tokens.tolist() for row, _ in packed[index:]]


def test_a_state_beyond_its_block_is_rejected() -> None:
    packer = BestFitPacker(8, END)
    with pytest.raises(ValueError, match=r"is row 5 of the block at None, but the block has 1 rows"):
        next(packer.pack(_documents([5]), PackerState(None, 5, {})))
    assert packer.fingerprint != BestFitPacker(9, END).fingerprint, "blocks depend on the length of rows"
    with pytest.raises(ValueError, match="seq_len is 0, must be at least 1"):
        BestFitPacker(0, END)


def test_rows_are_not_in_order_of_length() -> None:
    rng = np.random.default_rng(0)
    rows = _pack(np.minimum(rng.lognormal(3, 1.2, 4000).astype(int) + 2, 500).tolist(), 128)
    longest = [max(stop - start for _, start, stop in row.segments) for row in rows[:400]]
    assert abs(np.corrcoef(longest, np.arange(400))[0, 1]) < 0.15


@pytest.mark.parametrize("seq_len", [1024, 2048, 4096])
def test_web_documents_need_less_than_1_percent_padding_and_few_splits(seq_len: int) -> None:
    rng = np.random.default_rng(1)
    # log-normal lengths, as on the web: most documents are short, a few are longer than a row
    lengths = np.clip(rng.lognormal(5.1, 1.45, 1000), 2, 13_000).astype(int).tolist()
    # a few blocks of documents
    sample = rng.choice(lengths, size=5 * 512 * seq_len // int(np.mean(lengths))).tolist()
    rows = _pack(sample, seq_len)
    assert 0 <= _padding_fraction(rows) <= 0.01
    num_splits = sum(1 for row in rows for _, start, _ in row.segments if start > 0)
    num_needed = sum((length - 2) // seq_len for length in sample)
    assert num_splits - num_needed <= 0.02 * len(sample), "few documents that fit into a row are split"


ADVERSARIAL = {
    "just above half a row": lambda rng: rng.integers(66, 90, 3000),
    "just below a row": lambda rng: rng.integers(110, 125, 3000),
    "constant": lambda rng: np.full(3000, 100),
    "longer than a row": lambda rng: rng.integers(129, 5000, 300),
    "alternating": lambda rng: np.tile([70, 129, 3], 1500),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_padding_is_at_most_1_percent_for_adversarial_lengths(name: str) -> None:
    lengths = ADVERSARIAL[name](np.random.default_rng(3)).tolist()
    # a last block of less than 100 rows may have more than 1% padding
    lengths += [1] * (-sum(lengths) % (512 * 128))
    rows = _pack(lengths, 128)
    assert _padding_fraction(rows) <= 0.0105
    kept = sum(row.num_tokens for row in rows)
    assert kept >= sum(lengths)
    assert kept - sum(lengths) == sum(1 for row in rows for _, start, _ in row.segments if start > 0)


@pytest.mark.parametrize("seed", range(30))
def test_a_split_leaves_no_part_of_a_single_token(seed: int) -> None:
    # such a part would have no label, and the next one would begin with the same token
    generator = random.Random(seed)
    capacity = 12
    bins = [[Span(n, 0, generator.randint(2, capacity))] for n in range(60)]
    spans = [span for each in dissolve_emptiest(bins, capacity, 0.01) for span in each]
    assert len(spans) > len(bins), "some are split"
    assert min(span.length for span in spans) >= 2
