import gc
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import ParquetSource
from data.loader import PackedLoader
from data.packing import MicroBatch
from data.parquet import ParquetDocuments
from data.tokenizer import Tokenizer

CORPUS = Path(__file__).parents[2] / "../shared/data/corpus"
QWEN3 = Path(__file__).parents[2] / "../shared/data/qwen3_tokenizer"
needs_corpus = pytest.mark.skipif(not (CORPUS.is_dir() and QWEN3.is_dir()), reason="the corpus is not here")

# Two files with rows to skip at every kind of place, and documents shorter and longer than a row.
FILES: list[list[object]] = [
    [None, "ab", "", "cdefghijklmnopqrstuvwxyz" * 3, "g", 7],
    [],
    ["hijk", "lmnopqrstu", None, None, "vw", "xyz0123456789", "  "],
]
TEXTS = [text for file in FILES for text in file if isinstance(text, str) and text.strip()]


def _stream(tokenizer: Tokenizer, texts: Sequence[str], num_epochs: int = 1) -> list[int]:
    documents = [[*tokenizer.encode(text), tokenizer.end_of_document_id] for text in texts]
    return list(itertools.chain.from_iterable(documents)) * num_epochs


def _make(source: Any, tokenizer: Tokenizer, **changes: Any) -> PackedLoader:
    sizes: dict[str, Any] = {
        "seq_len": 8,
        "local_batch_size": 1,
        "global_batch_size": 4,
        "dp_rank": 0,
        "dp_world_size": 1,
        "prefetch_batches": 0,
    }
    return PackedLoader(source, tokenizer, **{**sizes, **changes})


def _take(loader: PackedLoader, count: int) -> list[MicroBatch]:
    return list(itertools.islice(loader, count))


def _equal(first: Sequence[MicroBatch], second: Sequence[MicroBatch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a_labels, b_labels)
        and a_input.keys() == b_input.keys()
        and all(torch.equal(a_input[name], b_input[name]) for name in a_input)
        for (a_input, a_labels), (b_input, b_labels) in zip(first, second, strict=True)
    )


def _ranks(source: Any, tokenizer: Tokenizer, world: int, **changes: Any) -> list[PackedLoader]:
    return [_make(source, tokenizer, dp_rank=rank, dp_world_size=world, **changes) for rank in range(world)]


def _steps(loaders: Sequence[PackedLoader], num_micro_steps: int, num_steps: int) -> list[torch.Tensor]:
    """The rows of each global batch in their global order, put together from all ranks' micro-batches."""
    iterators = [iter(loader) for loader in loaders]
    steps = []
    for _ in range(num_steps):
        rows = [next(iterator)[0]["input"] for _ in range(num_micro_steps) for iterator in iterators]
        steps.append(torch.cat(rows))
    for loader in loaders:
        loader.close()
    return steps


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
    loader = _make(source, byte_tokenizer, seq_len=seq_len, mask_documents=False, prefetch_batches=prefetch)
    expected = _stream(byte_tokenizer, texts, num_epochs=seq_len + 2)
    num_rows = (len(expected) - 1) // seq_len
    batches = _take(loader, num_rows)
    loader.close()
    covered = num_rows * seq_len
    assert torch.cat([batch["input"][0] for batch, _ in batches]).tolist() == expected[:covered]
    assert torch.cat([labels[0] for _, labels in batches]).tolist() == expected[1 : covered + 1]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    seq_len=st.integers(1, 13),
    world=st.integers(1, 4),
    local=st.integers(1, 3),
    mask=st.booleans(),
)
def test_validation_predicts_each_token_once_in_equally_many_batches_a_rank(
    byte_tokenizer: Tokenizer,
    list_source: Any,
    lengths: list[int],
    seq_len: int,
    world: int,
    local: int,
    mask: bool,
) -> None:
    texts = ["abcdefghijklmnopqrstuvwxyz0123456789ABCDEF"[:length] for length in lengths]
    loaders = _ranks(
        list_source([texts]),
        byte_tokenizer,
        world,
        seq_len=seq_len,
        local_batch_size=local,
        global_batch_size=local * world,
        mask_documents=mask,
        repeat=False,
    )
    passes = [list(loader) for loader in loaders]
    assert len({len(batches) for batches in passes}) == 1
    targets = torch.cat([labels.flatten() for step in zip(*passes, strict=True) for _, labels in step])
    documents = [[*byte_tokenizer.encode(text), byte_tokenizer.end_of_document_id] for text in texts]
    expected = [token for document in documents for token in document[1:]]
    if not mask:
        expected = list(itertools.chain.from_iterable(documents))[1:]
    assert targets[targets != -100].tolist() == expected


def test_validation_starts_over_with_each_iterator_also_after_a_break(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    loader = _make(list_source(FILES), byte_tokenizer, repeat=False, prefetch_batches=2)
    whole = list(loader)
    assert _equal(_take(loader, 3), whole[:3])
    assert _equal(list(loader), whole)


@pytest.mark.parametrize("mask", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_at_every_step_equals_no_interruption(
    byte_tokenizer: Tokenizer, list_source: Any, mask: bool, prefetch: int
) -> None:
    source = list_source(FILES)

    def new() -> PackedLoader:
        return _make(source, byte_tokenizer, mask_documents=mask, prefetch_batches=prefetch, seq_len=7)

    whole_loader = new()
    states = [json.dumps(whole_loader.state_dict())]
    whole: list[MicroBatch] = []
    for batch in itertools.islice(whole_loader, 60):
        whole.append(batch)
        states.append(json.dumps(whole_loader.state_dict()))
    whole_loader.close()
    assert json.loads(states[-1])["position"]["epoch"] >= 2, "the test must cross epochs"
    for step, state in enumerate(states[:50]):
        resumed = new()
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        assert _equal(_take(resumed, 8), whole[step : step + 8])
        assert json.dumps(resumed.state_dict()) == states[step + 8]
        resumed.close()


def test_a_training_loader_goes_on_where_its_last_iterator_stopped(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source(FILES)
    whole = _take(_make(source, byte_tokenizer), 12)
    loader = _make(source, byte_tokenizer, prefetch_batches=4)
    assert _equal([*_take(loader, 5), *_take(loader, 7)], whole)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("local", [1, 2])
def test_any_number_of_ranks_sees_the_same_global_batches(
    byte_tokenizer: Tokenizer, list_source: Any, world: int, local: int
) -> None:
    source = list_source(FILES)
    steps = _steps(
        _ranks(
            source, byte_tokenizer, world, local_batch_size=local, global_batch_size=8, mask_documents=False
        ),
        8 // (world * local),
        4,
    )
    stream = _stream(byte_tokenizer, TEXTS, num_epochs=4)
    expected = [[stream[row * 8 : row * 8 + 8] for row in range(step * 8, step * 8 + 8)] for step in range(4)]
    assert [step.tolist() for step in steps] == expected


@settings(max_examples=25, deadline=None)
@given(
    worlds=st.permutations([1, 2, 4]),
    local=st.integers(1, 2),
    num_steps=st.lists(st.integers(1, 3), min_size=3, max_size=3),
)
def test_a_state_continues_on_another_number_of_ranks(
    byte_tokenizer: Tokenizer, list_source: Any, worlds: list[int], local: int, num_steps: list[int]
) -> None:
    source = list_source(FILES)
    sizes = {"global_batch_size": 8, "mask_documents": False}
    whole = _steps([_make(source, byte_tokenizer, **sizes)], 8, sum(num_steps))
    legs: list[torch.Tensor] = []
    state: str | None = None
    for world, count in zip(worlds, num_steps, strict=True):
        loaders = _ranks(source, byte_tokenizer, world, local_batch_size=local, **sizes)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        legs += _steps(loaders, 8 // (world * local), count)
        states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders}
        assert len(states) == 1, "every rank has the same state"
        (state,) = states
    assert all(torch.equal(leg, step) for leg, step in zip(legs, whole, strict=True))


def test_masked_rows_of_a_rank_join_with_their_bounds(byte_tokenizer: Tokenizer, list_source: Any) -> None:
    source = list_source([["abc", "de", "fghijklmnopq", "r"]])
    (batch, labels), *_ = _take(_make(source, byte_tokenizer, seq_len=5, local_batch_size=2), 1)
    end = byte_tokenizer.end_of_document_id
    ids = _stream(byte_tokenizer, ["abc", "de", "fghijklmnopq"])
    assert batch["input"].tolist() == [ids[:10]]
    assert [index for index, token in enumerate(ids[:10]) if token == end] == [3, 6]
    assert batch["cu_seqlens"].tolist() == [0, 4, 5, 7, 10]
    expected = ids[1:11]
    expected[3] = expected[6] = -100
    assert labels.tolist() == [expected]
    assert (batch["input"].dtype, labels.dtype) == (torch.int64, torch.int64)


def test_the_state_is_of_what_was_taken_and_not_of_what_was_prefetched(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source(FILES)
    loader, plain = _make(source, byte_tokenizer, prefetch_batches=8), _make(source, byte_tokenizer)
    ahead, behind = iter(loader), iter(plain)
    for taken in range(1, 6):
        next(ahead), next(behind)
        assert loader.state_dict() == plain.state_dict()
        assert loader.state_dict()["position"]["sequence"] == taken
    loader.close()


def test_skipped_rows_are_counted_once_an_epoch_and_after_a_resume(
    byte_tokenizer: Tokenizer, list_source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = list_source(FILES)
    loader = _make(source, byte_tokenizer, repeat=False)
    list(loader)
    assert loader.skipped == {"null": 3, "empty": 2, "not_text": 1}
    assert "rows skipped: 3 null, 2 empty, 1 not_text" in caplog.text
    training = _make(source, byte_tokenizer)
    while training.state_dict()["position"]["epoch"] < 2:
        state = json.loads(json.dumps(training.state_dict()))
        training = _make(source, byte_tokenizer)
        training.load_state_dict(state)
        _take(training, 1)
    # Two epochs and the null that opens the third.
    assert training.skipped == {"null": 7, "empty": 4, "not_text": 2}


def test_a_source_without_a_document_raises_and_does_not_spin(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    for repeat in (True, False):
        loader = _make(list_source([[None, ""], [" "]]), byte_tokenizer, repeat=repeat, prefetch_batches=2)
        with pytest.raises(ValueError, match=r"a list holds no document \(rows skipped: 1 null, 2 empty\)"):
            next(iter(loader))


def test_a_damaged_file_surfaces_from_the_thread_after_the_batches_before_it(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source([["a" * 3000] * 300, ["b"]], fail_at=(1, 0))
    loader = _make(source, byte_tokenizer, seq_len=3000, prefetch_batches=2)
    taken: list[MicroBatch] = []
    with pytest.raises(ValueError, match=r"part-7\.parquet is damaged at row 3"):
        taken.extend(loader)
    assert len(taken) >= 200
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_no_thread_outlives_its_iterator(byte_tokenizer: Tokenizer, list_source: Any) -> None:
    def threads() -> int:
        return sum(thread.name == "prefetch" for thread in threading.enumerate())

    loader = _make(list_source(FILES), byte_tokenizer, prefetch_batches=2)
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
def test_an_iterator_from_before_a_load_ends_and_cannot_move_the_position(
    byte_tokenizer: Tokenizer, list_source: Any, prefetch: int
) -> None:
    loader = _make(list_source(FILES), byte_tokenizer, prefetch_batches=prefetch)
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
    ({"dp_rank": 2, "dp_world_size": 2}, "dp_rank is 2"),
    (
        {"global_batch_size": 6, "dp_world_size": 4},
        r"global_batch_size \(6\) must be a multiple .* the next is 8",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SIZES)
def test_sizes_that_do_not_fit_are_refused(
    byte_tokenizer: Tokenizer, list_source: Any, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _make(list_source(FILES), byte_tokenizer, **changes)


def test_a_state_of_other_files_or_another_tokenizer_is_refused(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    loader = _make(list_source(FILES), byte_tokenizer)
    _take(loader, 3)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"belongs to another source .*run.folder"):
        _make(list_source(FILES[:1]), byte_tokenizer).load_state_dict(state)
    other = {**state, "fingerprint": {**state["fingerprint"], "tokenizer": "x"}}
    with pytest.raises(ValueError, match="belongs to another tokenizer"):
        loader.load_state_dict(other)
    with pytest.raises(ValueError, match="version 0"):
        loader.load_state_dict({**state, "version": 0})
    with pytest.raises(ValueError, match="no position to load"):
        _make(list_source(FILES), byte_tokenizer, repeat=False).load_state_dict(state)


def test_a_state_whose_document_is_gone_is_refused(byte_tokenizer: Tokenizer, list_source: Any) -> None:
    source = list_source(FILES)
    loader = _make(source, byte_tokenizer)
    _take(loader, 2)
    state = loader.state_dict()
    assert state["position"]["offset"] > 0
    source.files = [[None] * 6, [], FILES[2]]
    changed = {**state, "fingerprint": {**state["fingerprint"], "source": source.fingerprint}}
    resumed = _make(source, byte_tokenizer)
    resumed.load_state_dict(changed)
    with pytest.raises(ValueError, match="the files or the tokenizer changed"):
        next(iter(resumed))


@needs_corpus
def test_the_real_corpus_with_the_qwen3_tokenizer(write_parquet: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.load(QWEN3)
    source = ParquetDocuments(ParquetSource(files=[str(CORPUS / "train-*.parquet")]))
    texts = [row.text for row in itertools.islice(source.read(), 120) if row.text is not None]
    stream = _stream(tokenizer, texts)
    loaders = _ranks(source, tokenizer, 2, seq_len=512, global_batch_size=4, prefetch_batches=2)
    steps = [list(itertools.islice(loader, 8)) for loader in loaders]
    states = [loader.state_dict() for loader in loaders]
    for loader in loaders:
        loader.close()
    rows = [batch for pair in zip(*steps, strict=True) for batch in pair]
    assert len(stream) > 16 * 512 + 1
    assert torch.cat([batch["input"][0] for batch, _ in rows]).tolist() == stream[: 16 * 512]
    for index, (batch, labels) in enumerate(rows):
        ids = torch.tensor(stream[index * 512 : index * 512 + 513])
        is_end = ids[:-1] == tokenizer.end_of_document_id
        assert torch.equal(labels[0], torch.where(is_end, -100, ids[1:]))
        inner = (is_end[:-1].nonzero().flatten() + 1).tolist()
        assert batch["cu_seqlens"].tolist() == [0, *inner, 512]
    assert states[0] == states[1]
    resumed = _make(source, tokenizer, seq_len=512)
    resumed.load_state_dict(states[0])
    assert next(iter(resumed))[0]["input"][0].tolist() == stream[16 * 512 : 17 * 512]
