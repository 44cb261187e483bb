import gc
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import ParquetSource
from data.loading.packing import MicroBatch
from data.sources.open import open_text
from data.tokenizer import Tokenizer
from tests.data.loading.loaders import (
    FILES,
    epoch_of,
    make_loader,
    make_ranks,
    take,
    token_stream,
)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    seq_len=st.integers(1, 13),
    prefetch=st.sampled_from([0, 2]),
)
def test_training_repeats_every_token_in_order(
    byte_tokenizer: Tokenizer, list_source: Any, lengths: list[int], seq_len: int, prefetch: int
) -> None:
    texts = ["abcdefghijklmnopqrstuvwxyz0123456789ABCDEF"[:length] for length in lengths]
    source = list_source([texts[: len(texts) // 2], texts[len(texts) // 2 :]])
    loader = make_loader(
        source, byte_tokenizer, seq_len=seq_len, mask_documents=False, prefetch_batches=prefetch
    )
    expected = token_stream(byte_tokenizer, texts, num_epochs=seq_len + 2)
    num_rows = (len(expected) - 1) // seq_len
    batches = take(loader, num_rows)
    loader.close()
    covered = num_rows * seq_len
    assert torch.cat([batch["input"][0] for batch, _ in batches]).tolist() == expected[:covered]
    assert torch.cat([labels[0] for _, labels in batches]).tolist() == expected[1 : covered + 1]


def test_masked_rows_of_a_micro_batch_are_concatenated_with_their_boundaries(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source([["abc", "de", "fghijklmnopq", "r"]])
    (batch, labels), *_ = take(make_loader(source, byte_tokenizer, seq_len=5, local_batch_size=2), 1)
    end = byte_tokenizer.end_of_document_id
    ids = token_stream(byte_tokenizer, ["abc", "de", "fghijklmnopq"])
    assert batch["input"].tolist() == [ids[:10]]
    assert [index for index, token in enumerate(ids[:10]) if token == end] == [3, 6]
    assert batch["cu_seqlens"].tolist() == [0, 4, 5, 7, 10]
    expected = ids[1:11]
    expected[3] = expected[6] = -100
    assert labels.tolist() == [expected]
    assert (batch["input"].dtype, labels.dtype) == (torch.int64, torch.int64)


def test_the_state_counts_yielded_and_not_prefetched_micro_batches(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source(FILES)
    loader, plain = (
        make_loader(source, byte_tokenizer, prefetch_batches=8),
        make_loader(source, byte_tokenizer),
    )
    ahead, behind = iter(loader), iter(plain)
    for taken in range(1, 6):
        next(ahead), next(behind)
        assert loader.state_dict() == plain.state_dict()
        assert loader.state_dict()["position"]["sequence"] == taken
    loader.close()


def test_skipped_rows_are_counted_once_per_epoch_and_across_a_resume(
    byte_tokenizer: Tokenizer, list_source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = list_source(FILES)
    training = make_loader(source, byte_tokenizer)
    while epoch_of(training) < 2:
        state = json.loads(json.dumps(training.state_dict()))
        training = make_loader(source, byte_tokenizer)
        training.load_state_dict(state)
        take(training, 1)
    # two epochs, and the null at the start of the third
    assert training.skipped == {"null": 7, "empty": 4, "not_text": 2}
    assert "rows skipped: 3 null, 2 empty, 1 not_text" in caplog.text


def test_a_source_without_a_document_raises_instead_of_looping(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    loader = make_loader(list_source([[None, ""], [" "]]), byte_tokenizer, prefetch_batches=2)
    with pytest.raises(ValueError, match=r"a list holds no document \(rows skipped: 1 null, 2 empty\)"):
        next(iter(loader))


def test_a_damaged_file_is_raised_from_the_thread_after_the_batches_before_it(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source([["a" * 3000] * 300, ["b"]], damaged_at=(1, 0))
    loader = make_loader(source, byte_tokenizer, seq_len=3000, prefetch_batches=2)
    taken: list[MicroBatch] = []
    with pytest.raises(ValueError, match="part-1 is damaged at row 0"):
        taken.extend(loader)
    assert len(taken) >= 200
    assert not [thread for thread in threading.enumerate() if "_populate_queue" in thread.name]


def test_no_thread_outlives_its_iterator(byte_tokenizer: Tokenizer, list_source: Any) -> None:
    def threads() -> int:
        # torchdata's name of its thread
        return sum("_populate_queue" in thread.name for thread in threading.enumerate())

    loader = make_loader(list_source(FILES), byte_tokenizer, prefetch_batches=2)
    for _ in loader:
        assert threads() == 1
        break
    gc.collect()
    assert threads() == 0
    first, second = iter(loader), iter(loader)
    next(first), next(second)
    assert threads() == 1
    assert next(first, None) is None, "a new iterator ends the old one"
    del loader, first, second
    gc.collect()
    assert threads() == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_loading_a_state_ends_an_earlier_iterator(
    byte_tokenizer: Tokenizer, list_source: Any, prefetch: int
) -> None:
    loader = make_loader(list_source(FILES), byte_tokenizer, prefetch_batches=prefetch)
    state = loader.state_dict()
    old = iter(loader)
    next(old), next(old)
    loader.load_state_dict(state)
    assert next(old, None) is None
    assert loader.state_dict() == state


BAD_SIZES = [
    ({"seq_len": 0}, "seq_len is 0"),
    ({"local_batch_size": 0}, "local_batch_size is 0"),
    ({"global_batch_size": 0}, "global_batch_size is 0"),
    (
        {"global_batch_size": 6, "dp_world_size": 4},
        r"global_batch_size \(6\) must be a multiple .* the next one is 8",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SIZES)
def test_wrong_sizes_are_rejected(
    byte_tokenizer: Tokenizer, list_source: Any, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(list_source(FILES), byte_tokenizer, **changes)


def test_a_state_of_other_files_or_another_tokenizer_is_rejected(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    loader = make_loader(list_source(FILES), byte_tokenizer)
    take(loader, 3)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"belongs to another source .*run.folder"):
        make_loader(list_source(FILES[:1]), byte_tokenizer).load_state_dict(state)
    other = {**state, "fingerprint": {**state["fingerprint"], "tokenizer": "x"}}
    with pytest.raises(ValueError, match=r"another tokenizer .*: restore data.tokenizer, "):
        loader.load_state_dict(other)
    with pytest.raises(ValueError, match=r"another packing .*: restore data.packing, "):
        make_loader(list_source(FILES), byte_tokenizer, packing="best_fit").load_state_dict(state)
    with pytest.raises(ValueError, match="belongs to another source"):
        make_loader(list_source(FILES, shuffle_seed=1), byte_tokenizer).load_state_dict(state)
    with pytest.raises(ValueError, match="version 0"):
        loader.load_state_dict({**state, "version": 0})
    for changes in ({"shuffle_seed": 0}, {"shuffle_seed": 0, "seq_len": 16}):
        with pytest.raises(ValueError, match=r"another packing .*concatenate into rows of .* shuffled rows"):
            make_loader(list_source(FILES), byte_tokenizer, **changes).load_state_dict(state)


def test_a_state_saved_before_rows_were_shuffled_is_rejected_with_the_remedy(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    loader = make_loader(list_source(FILES), byte_tokenizer, shuffle_seed=0)
    position = {"position": None, "offset": 0, "sequence": 4, "skipped": {}}
    saved = {**loader.state_dict(), "version": 2, "position": position}
    message = r"version 2, expected 3 \(it was saved before rows were shuffled\): .* another run.folder"
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(saved)


def test_a_state_whose_document_no_longer_exists_is_rejected(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source(FILES)
    loader = make_loader(source, byte_tokenizer)
    take(loader, 2)
    state = loader.state_dict()
    assert state["position"]["offset"] > 0
    other = list_source([[None] * 6, [], FILES[2]])
    changed = {**state, "fingerprint": {**state["fingerprint"], "source": other.fingerprint}}
    resumed = make_loader(other, byte_tokenizer)
    resumed.load_state_dict(changed)
    with pytest.raises(ValueError, match="the files or the tokenizer changed"):
        next(iter(resumed))


def test_two_ranks_on_a_parquet_corpus_resume_on_one(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus)
    source = open_text(ParquetSource(files=[str(corpus / "train*.parquet")]))
    texts = [row.text for row in source.read(repeat=False) if row.text is not None]
    stream = token_stream(tokenizer, texts)
    loaders = make_ranks(source, tokenizer, 2, seq_len=512, global_batch_size=4, prefetch_batches=2)
    steps = [list(itertools.islice(loader, 8)) for loader in loaders]
    states = [loader.state_dict() for loader in loaders]
    for loader in loaders:
        loader.close()
    rows = list[MicroBatch]()
    for pair in zip(*steps, strict=True):
        # either rank may have the first row of the two
        expected = stream[len(rows) * 512 : len(rows) * 512 + 512]
        rows += pair if pair[0][0]["input"][0].tolist() == expected else pair[::-1]
    assert len(stream) > 16 * 512 + 1
    assert torch.cat([batch["input"][0] for batch, _ in rows]).tolist() == stream[: 16 * 512]
    for index, (batch, labels) in enumerate(rows):
        ids = torch.tensor(stream[index * 512 : index * 512 + 513])
        is_end = ids[:-1] == tokenizer.end_of_document_id
        assert torch.equal(labels[0], torch.where(is_end, -100, ids[1:]))
        inner = (is_end[:-1].nonzero().flatten() + 1).tolist()
        assert batch["cu_seqlens"].tolist() == [0, *inner, 512]
    assert states[0] == states[1]
    resumed = make_loader(source, tokenizer, seq_len=512)
    resumed.load_state_dict(states[0])
    assert next(iter(resumed))[0]["input"][0].tolist() == stream[16 * 512 : 17 * 512]
