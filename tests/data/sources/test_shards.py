"""Training from prepared shards: order, resume and damage."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import ShardsSource, Split
from data.loading.loader import PackedLoader
from data.shards.prepare import PrepareOptions, prepare
from data.sources.mixture import MixtureDocuments
from data.sources.shard_format import shard_folder, write_json
from data.sources.shards import ShardDocuments
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_byte_level_bpe
from disk import replace

TEXTS = [f"{index} " + "abcdefghijk" * (index % 4) for index in range(300)]


@pytest.fixture(scope="session")
def shards(list_source: Any, byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared documents of 2 to 37 tokens, in many shards."""
    folder = tmp_path_factory.mktemp("shards")
    prepare(folder, list_source([TEXTS]), byte_tokenizer, PrepareOptions(shard_tokens=400))
    return folder


def _open(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    seed: int | None = None,
    split: Split = "all",
    skip_damaged: bool = False,
) -> ShardDocuments:
    source = ShardsSource(folder=str(folder), on_damaged_file="skip" if skip_damaged else "stop")
    return ShardDocuments(source, tokenizer_fingerprint=tokenizer.fingerprint, split=split, shuffle_seed=seed)


def _texts(rows: Any, tokenizer: Tokenizer) -> list[str | None]:
    return [None if row.tokens is None else tokenizer.decode(row.tokens[:-1].tolist()) for row in rows]


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_every_document_is_read_once_per_epoch_and_each_epoch_is_reshuffled(
    shards: Path, byte_tokenizer: Tokenizer, seed: int | None
) -> None:
    rows = _open(shards, byte_tokenizer, seed=seed).read(repeat=True)
    epochs = [_texts(itertools.islice(rows, 300), byte_tokenizer) for _ in range(3)]
    assert all(sorted(map(str, epoch)) == sorted(TEXTS) for epoch in epochs)
    assert (epochs[0] == epochs[1]) == (seed is None)
    if seed is not None:
        # shuffled across shards, not within them
        numbers = [int(str(text).split()[0]) for text in epochs[0]]
        jumps = [abs(first - second) for first, second in itertools.pairwise(numbers)]
        assert sum(jumps) / len(jumps) > 80


@settings(max_examples=40, deadline=None)
@given(seed=st.one_of(st.none(), st.integers(0, 9)), first=st.integers(0, 700))
def test_reading_resumes_from_any_position(
    shards: Path, byte_tokenizer: Tokenizer, seed: int | None, first: int
) -> None:
    source = _open(shards, byte_tokenizer, seed=seed)
    whole = list(itertools.islice(source.read(repeat=True), first, first + 50))
    again = source.read(json.loads(json.dumps(whole[0].next_position)), repeat=True)
    for expected, row in zip(whole[1:], again, strict=False):
        assert row.next_position == expected.next_position
        assert row.tokens is not None
        assert expected.tokens is not None
        assert row.tokens[:].tolist() == expected.tokens[:].tolist()


def _loader(source: Any, tokenizer: Tokenizer, **changes: Any) -> PackedLoader:
    sizes: dict[str, Any] = {
        "seq_len": 16,
        "local_batch_size": 1,
        "global_batch_size": 16,
        "dp_rank": 0,
        "dp_world_size": 1,
        "prefetch_batches": 0,
        "mask_documents": False,
    }
    return PackedLoader(source, tokenizer, **{**sizes, **changes})


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and windows of a few rows, so that a short test crosses many."""
    monkeypatch.setattr("data.loading.best_fit.BLOCK_ROWS", 20)
    monkeypatch.setattr("data.loading.shard_rows.BLOCK_ROWS", 20)
    monkeypatch.setattr("data.loading.rows.LAYOUT_WINDOW_ROWS", 50)


@pytest.mark.parametrize("row_seed", [None, 3], ids=["in_order", "shuffled"])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_run_on_4_ranks_resumes_on_2_3_and_then_on_8(
    shards: Path, byte_tokenizer: Tokenizer, packing: str, row_seed: int | None, small_windows: None
) -> None:
    def steps(world: int, count: int, state: str | None) -> tuple[list[torch.Tensor], str]:
        loaders = [
            _loader(
                _open(shards, byte_tokenizer, seed=3, split="train"),
                byte_tokenizer,
                dp_rank=rank,
                dp_world_size=world,
                packing=packing,
                shuffle_seed=row_seed,
                global_batch_size=48,
            )
            for rank in range(world)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        iterators = [iter(loader) for loader in loaders]
        rows = [
            torch.cat([next(each)[0]["input"] for _ in range(48 // world) for each in iterators])
            for _ in range(count)
        ]
        (state,) = {json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders}
        return rows, state

    whole, _ = steps(1, 22, None)
    legs: list[torch.Tensor] = []
    state: str | None = None
    for world, count in ((4, 7), (2, 5), (3, 5), (8, 5)):
        rows, state = steps(world, count, state)
        legs += rows
    assert state is not None
    assert json.loads(state)["position"]["position"]["epoch"] >= 1, "the test must cross epochs"
    assert all(torch.equal(leg, step) for leg, step in zip(legs, whole, strict=True))


@pytest.mark.parametrize("row_seed", [None, 1], ids=["in_order", "shuffled"])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_resuming_at_every_step_is_bit_identical_to_no_interruption(
    shards: Path, byte_tokenizer: Tokenizer, packing: str, row_seed: int | None, small_windows: None
) -> None:
    source = _open(shards, byte_tokenizer, seed=1)
    loader = _loader(source, byte_tokenizer, packing=packing, shuffle_seed=row_seed)
    states, rows = [json.dumps(loader.state_dict())], []
    for batch, _ in itertools.islice(loader, 700):
        rows.append(batch["input"])
        states.append(json.dumps(loader.state_dict()))
    assert max(map(len, states)) < 420, "the state does not grow"
    # every row of the first windows and of an epoch's end, then every seventh
    for step in (*range(130), *range(330, 350), *range(350, 660, 7)):
        resumed = _loader(source, byte_tokenizer, packing=packing, shuffle_seed=row_seed)
        resumed.load_state_dict(json.loads(states[step]))
        taken = [batch["input"] for batch, _ in itertools.islice(resumed, 40)]
        assert torch.equal(torch.cat(taken), torch.cat(rows[step : step + 40]))


@pytest.mark.parametrize("row_seed", [None, 1], ids=["in_order", "shuffled"])
def test_a_rank_reads_the_tokens_of_its_own_rows_only(
    shards: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, row_seed: int | None
) -> None:
    num_bytes: Counter[int] = Counter()
    reading_rank = 0
    pread = os.pread

    def count(descriptor: int, length: int, offset: int) -> bytes:
        num_bytes[reading_rank] += length
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", count)
    world = 8
    for reading_rank in range(world):
        source = _open(shards, byte_tokenizer, seed=1)
        loader = _loader(
            source, byte_tokenizer, dp_rank=reading_rank, dp_world_size=world, shuffle_seed=row_seed
        )
        for _ in itertools.islice(loader, 20):
            pass
    used = 4 * 20 * 17
    # whole documents are read, of at most 37 tokens, and none twice for rows in order
    assert all(used <= num_bytes[rank] < used + 20 * 4 * 2 * 37 for rank in range(world))


def test_train_and_held_out_documents_are_disjoint(shards: Path, byte_tokenizer: Tokenizer) -> None:
    train, held_out = (
        set(_texts(_open(shards, byte_tokenizer, split=split).read(repeat=False), byte_tokenizer))
        for split in ("train", "held_out")
    )
    assert train | held_out == set(TEXTS)
    assert not train & held_out
    assert held_out


def test_a_mixture_of_shards_and_text_resumes(
    shards: Path, byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    sources = {
        "shards": _open(shards, byte_tokenizer, seed=1),
        "text": list_source([["own text " * 3, "more of it"]], shuffle_seed=1),
    }
    mixture = MixtureDocuments(sources, {"shards": 3.0, "text": 1.0})
    shuffle = {"shuffle_seed": 2, "shuffle_window": 13}
    whole = _loader(mixture, byte_tokenizer, **shuffle)
    rows = [batch["input"] for batch, _ in itertools.islice(whole, 30)]
    state = json.loads(json.dumps(whole.state_dict()))
    after = [batch["input"] for batch, _ in itertools.islice(whole, 10)]
    resumed = _loader(mixture, byte_tokenizer, **shuffle)
    resumed.load_state_dict(state)
    assert torch.equal(
        torch.cat([batch["input"] for batch, _ in itertools.islice(resumed, 10)]), torch.cat(after)
    )
    text = byte_tokenizer.decode(torch.cat(rows).flatten().tolist())
    assert "own text" in text
    assert "abcdefghijk" in text


def test_shards_of_another_tokenizer_are_rejected(shards: Path) -> None:
    other = Tokenizer(train_byte_level_bpe(["abab"], 258))
    with pytest.raises(ValueError, match=r"was prepared with tokenizer .*set data\.tokenizer"):
        _open(shards, other)
    backend = train_byte_level_bpe([], 257)
    backend.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"the vocabulary is the same, but normalizer, .*data\.tokenizer"):
        _open(shards, Tokenizer(backend))


def test_shards_of_an_earlier_version_open_with_a_warning(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(tmp_path, list_source([TEXTS]), byte_tokenizer, PrepareOptions())
    _open(tmp_path, byte_tokenizer)
    assert not caplog.text
    for name in ("prepare.json", "manifest.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(
            text.replace(byte_tokenizer.fingerprint, byte_tokenizer.fingerprint[:16])
        )
    _open(tmp_path, byte_tokenizer)
    assert "was prepared by an earlier version: only the vocabulary of its tokenizer was" in caplog.text
    with pytest.raises(ValueError, match=r"was prepared with tokenizer .*set data\.tokenizer"):
        _open(tmp_path, Tokenizer(train_byte_level_bpe(["abab"], 258)))


@pytest.fixture
def damaged(list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder with a flipped bit, a truncated shard and a missing one."""
    prepare(tmp_path, list_source([TEXTS]), byte_tokenizer, PrepareOptions(shard_tokens=400))
    flipped, truncated, missing = (shard_folder(tmp_path, number) / "train.tokens" for number in (1, 3, 5))
    data = bytearray(flipped.read_bytes())
    data[0] ^= 4
    flipped.write_bytes(bytes(data))
    truncated.write_bytes(truncated.read_bytes()[:-400])
    missing.unlink()
    return tmp_path


def test_a_damaged_shard_is_named(damaged: Path, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"00003/train\.tokens has \d+ bytes, should have \d+: delete"):
        _open(damaged, byte_tokenizer)
    good = shard_folder(damaged, 0) / "train.tokens"
    for number in (3, 5):
        path = shard_folder(damaged, number) / "train.tokens"
        size = (400 * 4) if not path.exists() else path.stat().st_size
        path.write_bytes(good.read_bytes()[:size].ljust(size, b"\0"))
    # of the right size, or truncated only after the start: a document's checksum does not match
    reader = _open(damaged, byte_tokenizer, skip_damaged=True)._readers[0]
    with pytest.raises(ValueError, match=r"00001/train\.tokens is damaged in tokens 0 to \d+: delete"):
        reader.document(_number_of_first(reader, 1))[:]


def _number_of_first(reader: Any, shard: int) -> int:
    starts = reader._index["start"].tolist()
    return starts.index(reader._firsts[shard])


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_shuffled_rows_without_damaged_documents_resume_on_any_rank(
    damaged: Path, byte_tokenizer: Tokenizer, small_windows: None, packing: str
) -> None:
    def new(rank: int = 0, world: int = 1) -> PackedLoader:
        source = _open(damaged, byte_tokenizer, seed=2, skip_damaged=True)
        ranks = {"dp_rank": rank, "dp_world_size": world}
        return _loader(source, byte_tokenizer, shuffle_seed=2, packing=packing, **ranks)

    rows, states = [], []
    loader = new()
    for batch, _ in itertools.islice(loader, 720):
        rows.append(batch["input"])
        states.append(json.dumps(loader.state_dict()))
    assert json.loads(states[-1])["position"]["position"]["epoch"] >= 1, "the test must cross epochs"
    counts = [json.loads(state)["position"]["skipped"].get("damaged_document", 0) for state in states]
    assert 0 < counts[300] < counts[700]
    for step in range(0, 690, 23):
        ranks = [new(rank, 2) for rank in range(2)]
        for each in ranks:
            each.load_state_dict(json.loads(states[step]))
        iterators = [iter(each) for each in ranks]
        found = [next(each)[0]["input"] for _ in range(8) for each in iterators]
        assert torch.equal(torch.cat(found), torch.cat(rows[step + 1 : step + 17]))
        assert {json.dumps(each.state_dict()) for each in ranks} == {states[step + 16]}


def test_damaged_documents_are_skipped_and_counted_identically_on_all_ranks(
    damaged: Path, byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    source = _open(damaged, byte_tokenizer, seed=2, skip_damaged=True)
    rows = list(source.read(repeat=False))
    texts = _texts(rows, byte_tokenizer)
    good = [text for text in texts if text is not None]
    assert len(texts) == 300
    assert len(good) == len(set(good)) < 290
    assert set(good) < set(TEXTS)
    assert Counter(row.skipped for row in rows)["damaged_document"] == 300 - len(good)
    assert "skipped the first damaged document of epoch 0" in caplog.text
    assert f"{len(good)} documents, {300 - len(good)} damaged ones skipped" in caplog.text
    ranks = [
        _loader(_open(damaged, byte_tokenizer, seed=2, skip_damaged=True), byte_tokenizer, **ranks)
        for ranks in ({}, {"dp_rank": 1, "dp_world_size": 4})
    ]
    for _ in itertools.islice(ranks[0], 400):
        pass
    for _ in itertools.islice(ranks[1], 100):
        pass
    assert ranks[0].skipped["damaged_document"] > 0
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_a_damaged_or_missing_index_is_named(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(tmp_path, list_source([TEXTS]), byte_tokenizer, PrepareOptions())
    index = tmp_path / "train.index"
    index.write_bytes(index.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"train\.index has \d+ bytes, should have"):
        _open(tmp_path, byte_tokenizer)
    index.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*train\.index"):
        _open(tmp_path, byte_tokenizer, skip_damaged=True)


def test_an_incomplete_folder_is_rejected_with_the_remedy(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    remedy = (
        r"holds no complete set of shards .*correct the folder, or make them with `python -m data\.shards"
    )
    with pytest.raises(ValueError, match=remedy):
        _open(tmp_path, byte_tokenizer)
    (tmp_path / "prepare.json").write_text("{}")
    with pytest.raises(ValueError, match="prepare` again to resume"):
        _open(tmp_path, byte_tokenizer)


def test_a_split_without_a_document_is_rejected(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(tmp_path, list_source([["only one, to train on"]]), byte_tokenizer, PrepareOptions())
    _open(tmp_path, byte_tokenizer, split="train")
    with pytest.raises(ValueError, match="holds no document of held_out"):
        _open(tmp_path, byte_tokenizer, split="held_out")


def test_many_shards_need_few_open_files(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.shards._OPEN_FILES", 3)
    prepare(tmp_path, list_source([TEXTS]), byte_tokenizer, PrepareOptions(shard_tokens=60))
    source = _open(tmp_path, byte_tokenizer, seed=1)
    before = len(os.listdir("/proc/self/fd"))
    assert sorted(map(str, _texts(source.read(repeat=False), byte_tokenizer))) == sorted(TEXTS)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 3
    del source
    assert len(os.listdir("/proc/self/fd")) < before


def test_a_file_and_a_folder_are_on_disk_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    rename = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), rename(*paths)))
    write_json(tmp_path / "a.json", {"a": 1})
    assert events == [(tmp_path / "a.json").stat().st_ino, "renamed", tmp_path.stat().st_ino]
    events.clear()
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "b").touch()
    replace(tmp_path / "x.partial", tmp_path / "x")
    inodes = [path.stat().st_ino for path in (tmp_path / "x" / "b", tmp_path / "x", tmp_path)]
    assert events == [*inodes[:2], "renamed", inodes[2]]
