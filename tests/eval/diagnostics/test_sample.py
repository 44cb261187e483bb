"""Which query rows are drawn, and what they see."""

from pathlib import Path

import pytest
import torch

from data.config import ParquetSource
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from eval.diagnostics.sample import NUM_QUERIES, draw_queries, num_rows, read_batch
from tests.eval.diagnostics.batches import make_batch
from tokens import IGNORE_INDEX

LENGTHS = [5, 9, 1, 23, 4, 2, 16]  # rows of 16: the second begins in the middle of a document, and the third


def test_all_queries_are_the_tokens_that_predict_one() -> None:
    batch = make_batch(LENGTHS, 16)
    sample = draw_queries(batch, 16, num_queries=None)
    rows, columns = sample.is_sampled_BN.nonzero(as_tuple=True)
    positions = rows * 16 + sample.query_BN[rows, columns]
    wanted = (batch.labels[0] != IGNORE_INDEX).nonzero().flatten()
    assert torch.equal(positions, wanted)
    assert sample.num_queries == sample.num_candidates == len(wanted)
    assert sample.facts()["positions"] == "all"


@pytest.mark.parametrize("masked", [True, False])
def test_what_a_query_sees_begins_at_its_document_and_its_row(masked: bool) -> None:
    batch = make_batch(LENGTHS, 16, masked=masked)
    sample = draw_queries(batch, 16, num_queries=None)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).tolist()
    for window in (None, 3):
        visible = sample.visible_keys(window)
        for row, column in sample.is_sampled_BN.nonzero().tolist():
            query = row * 16 + int(sample.query_BN[row, column])
            seen = [
                key
                for key in range(row * 16, query + 1)
                if (not masked or document[key] == document[query])
                and (window is None or query - key < window)
            ]
            assert int(visible.first_BN[row, column]) == seen[0] - row * 16
            is_start = seen[0] == 0 or document[seen[0]] != document[seen[0] - 1]
            first = next(
                key for key in range(row * 16, query + 1) if not masked or document[key] == document[query]
            )
            assert bool(visible.is_document_start_BN[row, column]) == (is_start and first == seen[0])
    assert not sample.is_whole_BN[sample.is_sampled_BN].all()


def test_a_sample_is_drawn_without_replacement_and_the_same_every_time() -> None:
    batch = make_batch([40] * 100, 64)
    sample, again = (draw_queries(batch, 64, num_queries=50) for _ in range(2))
    positions = sample.facts()["positions"]
    assert positions == again.facts()["positions"] == sorted({*positions})
    assert len(positions) == sample.num_queries == 50
    everything = draw_queries(batch, 64, num_queries=None)
    rows, columns = everything.is_sampled_BN.nonzero(as_tuple=True)
    assert {*positions} < {*(rows * 64 + everything.query_BN[rows, columns]).tolist()}
    # both ends of the batch are drawn from
    assert positions[0] < 400 < 3600 < positions[-1]
    other = draw_queries(make_batch([40] * 100, 64, seed=1), 64, num_queries=50)
    assert other.facts()["tokens_sha256"] != sample.facts()["tokens_sha256"]


def test_rows_of_the_loader_are_understood(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus)
    source = open_source(
        ParquetSource(files=[str(corpus / "validation.parquet")]),
        tokenizer_fingerprint=tokenizer.fingerprint,
        split="all",
    )
    batch = read_batch(source, tokenizer, seq_len=32, num_rows=4, mask_documents=True)
    sample = draw_queries(batch, 32, num_queries=None)
    is_end = sample.tokens_BT.flatten() == tokenizer.end_of_document_id
    for row, column in sample.is_sampled_BN.nonzero().tolist():
        start = row * 32 + int(sample.start_BN[row, column])
        assert bool(sample.is_whole_BN[row, column]) == (start == 0 or bool(is_end[start - 1]))


def test_the_batch_is_no_longer_than_a_step() -> None:
    assert num_rows(4096, 4_000_000) == 4
    assert num_rows(1024, 65536) == 16
    assert num_rows(32, 256) == 8
    assert num_rows(100_000, 4_000_000) == 1
    assert NUM_QUERIES >= 100
