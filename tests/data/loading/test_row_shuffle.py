"""Rows shuffled in windows: as good as rows drawn at random, each once per epoch, and exact to resume."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import JsonlSource, MixtureSource, ShardsSource
from data.loading.packing import PackedRow, PackerState, RowBlock
from data.loading.row_shuffle import RowShuffle
from data.loading.rows import open_rows
from data.loading.shard_rows import BLOCK_ROWS, Packing, ShardRows
from data.loading.stream import StreamState
from data.shards.prepare import PrepareOptions, prepare
from data.sources.base import DocumentSource
from data.sources.mixture import MixtureDocuments
from data.sources.open import open_source
from data.sources.shards import ShardDocuments
from data.tokenizer import Tokenizer
from errors import UserError
from tests.data.loading.test_shard_rows import first_token

SEQ_LEN = 16
BATCH = 32
PACKINGS: list[Packing] = ["concatenate", "best_fit"]


def long_texts(seed: int, count: int) -> list[str]:
    """Documents of 3 to 600 letters, of which the long ones hold most of the text."""
    lengths = np.exp(np.random.default_rng(seed).uniform(np.log(3), np.log(600), count)).astype(int)
    return [("abcdefghijklmnopqrstuvwxyz" * 24)[:length] for length in lengths.tolist()]


@pytest.fixture(scope="session")
def folder(list_source: Any, byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 prepared documents: about 2,000 rows of 16."""
    path = tmp_path_factory.mktemp("row_shuffle")
    options = PrepareOptions(shard_tokens=3000)
    prepare(path, list_source([long_texts(0, 300)]), byte_tokenizer, options)
    return path


def shards(folder: Path, tokenizer: Tokenizer, seed: int | None = 0) -> ShardDocuments:
    source = ShardsSource(folder=str(folder))
    return ShardDocuments(
        source, tokenizer_fingerprint=tokenizer.fingerprint, split="train", shuffle_seed=seed
    )


def shuffled(source: DocumentSource, tokenizer: Tokenizer, packing: Packing, **changes: Any) -> Any:
    """Rows of a source; `changes` override the arguments."""
    settings: dict[str, Any] = {"seq_len": SEQ_LEN, "shuffle_seed": 0, "window_rows": 16 * BATCH}
    return open_rows(source, tokenizer, packing=packing, **{**settings, **changes})


def mean_largest_share(rows: Sequence[PackedRow]) -> float:
    """The largest share of a batch that stems from one document, its mean over batches."""
    shares = []
    for first in range(0, len(rows) - BATCH + 1, BATCH):
        tokens: Counter[int] = Counter()
        for segment in itertools.chain.from_iterable(row.segments for row in rows[first : first + BATCH]):
            document = getattr(segment.tokens, "_start", -id(segment.tokens))
            tokens[document] += segment.stop - segment.start
        shares.append(max(tokens.values()) / tokens.total())
    return float(np.mean(shares))


def shares_of_random_rows(rows: Sequence[PackedRow], window: int) -> np.ndarray:
    """Mean largest shares of batches of rows drawn at random from each window, of 60 draws."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(60):
        starts = range(0, len(rows), window)
        order = [first + rng.permutation(min(window, len(rows) - first)) for first in starts]
        draws.append(mean_largest_share([rows[index] for index in np.concatenate(order)]))
    return np.array(draws)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["shards", "text", "mixture"])
def test_documents_are_spread_over_batches_as_by_rows_drawn_at_random(
    folder: Path, byte_tokenizer: Tokenizer, list_source: Any, packing: Packing, kind: str
) -> None:
    text = list_source([long_texts(1, 400)], shuffle_seed=0)
    source: DocumentSource = text if kind == "text" else shards(folder, byte_tokenizer)
    if kind == "mixture":
        source = MixtureDocuments({"web": source, "own": text}, {"web": 2.0, "own": 1.0})
    in_order = shuffled(source, byte_tokenizer, packing, shuffle_seed=None)
    # of shards an epoch, of the others three windows
    window = 16 * BATCH
    num_rows = 3 * window
    if kind == "shards":
        window = num_rows = next(
            state.window_rows for _, state in shuffled(source, byte_tokenizer, packing).rows(StreamState())
        )
    ordered = [row for row, _ in itertools.islice(in_order.rows(StreamState()), num_rows)]
    draws = shares_of_random_rows(ordered, window)
    deviations = []
    for seed in range(12):
        rows = shuffled(source, byte_tokenizer, packing, shuffle_seed=seed).rows(StreamState())
        share = mean_largest_share([row for row, _ in itertools.islice(rows, num_rows)])
        deviations.append((share - draws.mean()) / draws.std())
    # the standard error is 0.3
    assert abs(np.mean(deviations)) < 1.2
    assert np.std(deviations) < 2
    # best_fit shuffles the rows of its blocks of 512 rows, which are as large as these windows of text
    if packing == "concatenate" or kind == "shards":
        assert mean_largest_share(ordered) > draws.mean() + 15 * draws.std()


def labels_of(rows: Sequence[PackedRow]) -> Counter[tuple[int, int]]:
    """Number of times that each token of each document of shards is a label within its document."""
    counts: Counter[tuple[int, int]] = Counter()
    for tokens, start, stop in itertools.chain.from_iterable(row.segments for row in rows):
        counts.update((first_token(tokens), label) for label in range(start + 1, stop))
    return counts


@pytest.mark.parametrize("window_rows", [50, 700, 1 << 16], ids=["many", "two", "one_window"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_pair_of_input_and_label_is_served_once_per_epoch_of_shards(
    folder: Path,
    byte_tokenizer: Tokenizer,
    packing: Packing,
    window_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.loading.rows.LAYOUT_WINDOW_ROWS", window_rows)
    monkeypatch.setattr("data.loading.shard_rows.BLOCK_ROWS", 20)
    source = shards(folder, byte_tokenizer)
    stored = [source.tokens(number) for number in range(source.num_documents)]
    labels = {(first_token(each), label) for each in stored for label in range(1, len(each))}
    served: list[PackedRow] = []
    orders: list[list[Any]] = []
    window_sizes: list[int] = []
    for row, state in shuffled(source, byte_tokenizer, packing).rows(StreamState()):
        served.append(row)
        window_sizes += [state.window_rows] if state.served == 1 else []
        if state.served or state.position["epoch"] == len(orders):
            continue
        # the last row of a concatenated epoch holds the first tokens of the next one, which is counted there
        epoch, place = state.position["epoch"], state.position["place"]
        begun = next(source.chunks({"epoch": epoch, "place": 0}, repeat=False)).numbers.tolist()[: place + 1]
        early = [(number, len(stored[number])) for number in begun[:place]] + [(begun[-1], state.offset + 1)]
        early = {(first_token(stored[number]), label) for number, stop in early for label in range(1, stop)}
        expected = Counter(dict.fromkeys(labels, epoch)) + Counter(early)
        assert labels_of(served) == expected
        assert (packing == "concatenate") or not early
        orders.append([[(first_token(each.tokens), each.start) for each in row.segments] for row in served])
        if len(orders) == 3:
            break
    first, second = orders[0], orders[1][len(orders[0]) :]
    assert first != second
    assert sorted(map(tuple, first)) != first
    # no window is smaller, except where the whole epoch is
    assert sum(window_sizes) == len(served)
    if window_rows == 700:
        assert len(window_sizes) == 9
        assert min(window_sizes) >= 700
    assert (window_rows < 1 << 16) or len(window_sizes) == 3


@pytest.mark.parametrize("window_rows", [1, 5, 64])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_window_of_text_holds_the_rows_that_come_in_order(
    byte_tokenizer: Tokenizer, list_source: Any, packing: Packing, window_rows: int
) -> None:
    source = list_source([long_texts(3, 20)], shuffle_seed=1)
    in_order = shuffled(source, byte_tokenizer, packing, shuffle_seed=None).rows(StreamState())
    rows = shuffled(source, byte_tokenizer, packing, window_rows=window_rows).rows(StreamState())
    orders = []
    for window in range(8):
        expected = [row.tokens.tolist() for row, _ in itertools.islice(in_order, window_rows)]
        served = list(itertools.islice(rows, window_rows))
        found = [row.tokens.tolist() for row, _ in served]
        assert sorted(found) == sorted(expected)
        orders.append([expected.index(row) for row in found])
        assert [state.sequence for _, state in served] == [
            *range(window * window_rows + 1, (window + 1) * window_rows + 1)
        ]
    assert window_rows == 1 or len(set(map(tuple, orders))) > 1


class CountedRows:
    """Rows that are numbers, in blocks, which count how many were made."""

    def __init__(self, block_rows: int, epoch_rows: int | None = None) -> None:
        self.block_rows = block_rows
        self.epoch_rows = epoch_rows
        self.num_made = 0

    def blocks(self, start: PackerState) -> Iterator[RowBlock]:
        first = 0 if start.position is None else start.position["row"]
        while True:
            left = float("inf") if self.epoch_rows is None else self.epoch_rows - first % self.epoch_rows
            stop = first + int(min(self.block_rows, left))
            self.num_made += stop - first
            rows: Any = list(range(first, stop))
            left -= stop - first
            after = PackerState({"row": stop}, 0, {"null": stop // 4})
            yield RowBlock(rows=rows, next=after, rows_left=left or self.epoch_rows or 0, ends_epoch=not left)
            first = stop


def _served(
    source: CountedRows, count: int, state: StreamState | None = None, window_rows: int = 40
) -> list[tuple[int, StreamState]]:
    rows: Any = RowShuffle(source, packing="", seed=0, window_rows=window_rows).rows(state or StreamState())
    return list(itertools.islice(rows, count))


@pytest.mark.parametrize("block_rows", [1, 8])
@pytest.mark.parametrize("epoch_rows", [None, 30, 95, 400])
def test_the_next_window_is_made_at_the_pace_of_serving(block_rows: int, epoch_rows: int | None) -> None:
    source = CountedRows(block_rows, epoch_rows)
    rows: Any = RowShuffle(source, packing="", seed=0, window_rows=40).rows(StreamState())
    next(rows)
    made = [source.num_made]
    assert made[0] <= 2 * 40
    for _ in range(1000):
        next(rows)
        made.append(source.num_made)
    # an epoch of 95 rows is one window of 95 and not one of 40 and one of 55
    assert max(np.diff(made)) <= (2 * block_rows if epoch_rows != 95 else 3 * block_rows)
    held = [count - served for served, count in enumerate(made, 1)]
    assert max(held) <= (40 if epoch_rows is None else 2 * 40) + 2 * block_rows


def test_rows_are_dropped_once_served(byte_tokenizer: Tokenizer, list_source: Any) -> None:
    import gc

    def num_held() -> int:
        gc.collect()
        return sum(isinstance(each, PackedRow) for each in gc.get_objects())

    before = num_held()
    source = list_source([long_texts(3, 200)])
    rows = shuffled(source, byte_tokenizer, "concatenate", window_rows=64).rows(StreamState())
    state = StreamState()
    for _ in range(5):
        state = [state for _, state in itertools.islice(rows, 29)][-1]
        assert num_held() - before <= 64 + 3
    assert state.served > 10
    del rows
    rows = shuffled(source, byte_tokenizer, "concatenate", window_rows=64).rows(state)
    next(rows)
    assert num_held() - before <= 64 - state.served + 3, "a resume drops what was served before it"


@pytest.mark.parametrize("epoch_rows", [30, 79, 80, 81, 95, 400])
def test_windows_end_with_the_epoch_and_none_is_small(epoch_rows: int) -> None:
    served = _served(CountedRows(8, epoch_rows), 3 * epoch_rows)
    sizes = [state.window_rows for _, state in served if state.served == 1]
    assert sum(sizes) == 3 * epoch_rows
    assert all(min(40, epoch_rows) <= size < 2.25 * 40 + 8 for size in sizes)
    for epoch in range(3):
        rows = [row for row, _ in served[epoch * epoch_rows : (epoch + 1) * epoch_rows]]
        assert sorted(rows) == [*range(epoch * epoch_rows, (epoch + 1) * epoch_rows)]


def test_a_saved_window_keeps_its_size_in_a_run_with_another() -> None:
    whole = _served(CountedRows(1), 60)
    rows = [row for row, _ in whole]
    _, state = whole[17]
    resumed = _served(CountedRows(1), 122, state, window_rows=100)
    assert [row for row, _ in resumed[:22]] == rows[18:40]
    assert sorted(row for row, _ in resumed[22:]) == [*range(40, 140)]


def test_a_window_of_another_size_than_the_saved_one_is_rejected() -> None:
    _, state = _served(CountedRows(8), 3)[-1]
    with pytest.raises(ValueError, match=r"window of 40 rows, but the window has 42: the data .* changed"):
        _served(CountedRows(7), 1, state)


def test_a_window_with_other_skipped_rows_than_the_saved_one_mixed_two_layouts_in_silence(
    folder: Path, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "shards")
    files = sorted((tmp_path / "shards").rglob("train.tokens"))
    source = ShardsSource(folder=str(tmp_path / "shards"), on_damaged_file="skip")

    def rows() -> RowShuffle:
        documents = ShardDocuments(
            source, tokenizer_fingerprint=byte_tokenizer.fingerprint, split="train", shuffle_seed=None
        )
        layout = ShardRows(documents, packing="concatenate", seq_len=SEQ_LEN, padding_id=0)
        return RowShuffle(layout, packing="", seed=0, window_rows=BLOCK_ROWS)

    _, state = next(rows().rows(StreamState()))
    _, following = next(rows().rows(state))
    assert (following.window_rows, following.served) == (state.window_rows, 2)
    content = bytearray(files[0].read_bytes())
    content[0] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(
        UserError, match=r"rows \(skipped: none\), .* \(skipped: 1 damaged_document\): .*prepare"
    ):
        next(rows().rows(state))
    # a run that begins with the damage resumes as long as it is there
    _, state = next(rows().rows(StreamState()))
    next(rows().rows(state))
    content[0] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(UserError, match=r"rows \(skipped: 1 damaged_document\), .* \(skipped: none\)"):
        next(rows().rows(state))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("is_mixture", [False, True], ids=["plain", "mixture"])
def test_a_window_with_skipped_rows_resumes_at_any_row(
    packing: Packing, is_mixture: bool, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    files = []
    for seed in range(3):
        lines = [json.dumps({"text": text}) for text in long_texts(seed, 60)]
        files.append(tmp_path / f"{seed}.jsonl")
        files[-1].write_text("\n".join([*lines[:20], "{not JSON", *lines[20:], '{"text": null}']))
    first, *others = (JsonlSource(files=[str(file)], min_characters=10) for file in files)
    mixture = MixtureSource(sources={"a": first, "b": others[0]}, weights={"a": 1.0, "b": 2.0})
    config = mixture if is_mixture else JsonlSource(files=[str(file) for file in files], min_characters=10)

    def rows() -> Any:
        fingerprint = byte_tokenizer.fingerprint
        source = open_source(config, tokenizer_fingerprint=fingerprint, split="all", shuffle_seed=3)
        return shuffled(source, byte_tokenizer, packing, window_rows=30)

    whole = list(itertools.islice(rows().rows(StreamState()), 2000))
    resumed = range(0, len(whole) - 1, 29)
    assert any(whole[index][1].window_skipped for index in resumed)
    for index in resumed:
        row, after = next(rows().rows(whole[index][1]))
        expected_row, expected = whole[index + 1]
        assert row.tokens.tolist() == expected_row.tokens.tolist()
        assert after == expected


def test_rows_skipped_are_counted_in_proportion_to_the_rows_served() -> None:
    counts = [state.num_skipped.get("null", 0) for _, state in _served(CountedRows(1), 200)]
    assert counts == [(row + 1) // 4 for row in range(200)]
    plain = json.loads(json.dumps(_served(CountedRows(1), 50)[-1][1].to_dict()))
    assert StreamState.from_dict(plain).to_dict() == plain


def test_another_seed_gives_another_order() -> None:
    orders = []
    for seed in (0, 1):
        rows: Any = RowShuffle(CountedRows(1), packing="", seed=seed, window_rows=40).rows(StreamState())
        orders.append([row for row, _ in itertools.islice(rows, 40)])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_window_of_shards_is_held_in_little_memory(folder: Path, byte_tokenizer: Tokenizer) -> None:
    layout = ShardRows(shards(folder, byte_tokenizer), packing="concatenate", seq_len=SEQ_LEN, padding_id=0)
    block = next(layout.blocks(PackerState(None, 0, {})))
    arrays = vars(block.rows)["_layout"]
    num_bytes = sum(getattr(arrays, name).nbytes for name in ("documents", "starts", "stops", "firsts"))
    num_pieces = sum(len([*block.rows[index].segments]) for index in range(len(block.rows)))
    assert num_bytes <= 16 * num_pieces + 8 * (len(block.rows) + 1)
