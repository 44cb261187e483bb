"""The mean context per token that `python -m data.shards info` prints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loading.packing import PackedRow, Segment, SegmentTuple, collate
from data.shards.__main__ import main
from data.shards.context import mean_context, measure_context
from data.shards.prepare import PrepareOptions, prepare
from data.tokenizer import Tokenizer


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=5))
def test_the_mean_context_counts_the_tokens_of_the_document_before_each_input(rows: list[list[int]]) -> None:
    seq_len = max(1, max(sum(lengths) for lengths in rows) - 1)
    packed = [
        PackedRow(
            segments=SegmentTuple(Segment(np.zeros(length, dtype=np.int32), 0, length) for length in lengths),
            seq_len=seq_len,
            padding_id=0,
        )
        for lengths in rows
    ]
    # an input attends to the inputs since the last boundary of its row
    contexts = []
    for row, lengths in zip(packed, rows, strict=True):
        bounds = collate([row], mask_documents=True)[0]["cu_seqlens"].tolist()
        num_inputs = min(sum(lengths), seq_len)
        contexts += [index - max(bound for bound in bounds if bound <= index) for index in range(num_inputs)]
    assert mean_context(packed) == pytest.approx(np.mean(contexts) if contexts else 0)


@pytest.fixture
def folder(list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    texts = [f"{index} " + "abcdefghijk" * (index * index % 60) for index in range(200)]
    options = PrepareOptions(shard_tokens=5000)
    prepare(tmp_path, list_source([texts]), byte_tokenizer, options, description={"kind": "parquet"})
    return tmp_path


@pytest.mark.parametrize("max_rows", [1 << 14, 20])
def test_shuffling_rows_leaves_the_mean_context_as_it_is(
    folder: Path, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.loading.shard_rows.BLOCK_ROWS", 10)
    monkeypatch.setattr("data.loading.best_fit.BLOCK_ROWS", 10)
    by_packing = {each.packing: each for each in measure_context(folder, 256, max_rows)}
    for each in by_packing.values():
        assert each.is_whole == (max_rows > 20)
        assert each.served == pytest.approx(each.in_order, rel=0.01)
    assert by_packing["best_fit"].served > by_packing["concatenate"].served > 50


def test_info_prints_it_for_both_packings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder), "--seq-len", "64"]) == 0
    printed = capsys.readouterr().out
    assert "mean context per token in rows of 64 " in printed
    for each in measure_context(folder, 64, 1 << 14):
        assert f"{each.packing} " in printed
        assert (
            f"{each.served:,.1f}, without the shuffle of rows {each.in_order:,.1f} (all {each.num_rows:,}"
            in printed
        )
    with pytest.raises(ValueError, match="seq_len is 0"):
        main(["info", str(folder), "--seq-len", "0"])
