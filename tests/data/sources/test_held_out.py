"""The sample of held-out documents: drawn from the whole set, the same in any order, kept for a resume."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, HubSource, MixtureSource, ParquetSource, ShardsSource, Source
from data.shards.prepare import PrepareOptions, prepare
from data.sources import held_out
from data.sources.base import DocumentSource
from data.sources.document_sample import draw_sample
from data.sources.held_out import DRAWN_PER_TOKEN, MAX_HUB_FILES, open_held_out
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_byte_level_bpe


def make_texts(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return [f"{seed} {n} " + "x" * generator.randrange(60) for n in range(count)]


def documents_of(source: DocumentSource) -> list[tuple[int, ...]]:
    rows = [row.tokens for row in source.read(repeat=False) if row.skipped is None]
    return [tuple(tokens[:].tolist()) for tokens in rows if tokens is not None]


def opened(source: Source, tokenizer: Tokenizer, folder: Path, max_tokens: int, **changes: Any) -> Any:
    config = DataConfig(tokenizer="given", train=source, validation=source, **changes)
    return open_held_out(config, tokenizer, max_tokens=max_tokens, kept_in=folder, is_main_rank=True)


@pytest.mark.parametrize("seed", range(20))
def test_the_sample_is_the_same_prefix_of_one_order_whatever_the_files(
    seed: int, byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    generator = random.Random(seed)
    texts = make_texts(seed, 1500)
    everything = documents_of(draw_sample([list_source([texts])], byte_tokenizer, 1 << 40, ""))
    assert sorted(everything) == sorted((*byte_tokenizer.encode(text), 0) for text in texts)
    max_tokens = generator.randrange(1, 3000)
    flat = [token for document in everything for token in document][:max_tokens]
    for _ in range(2):
        generator.shuffle(texts)
        cut = generator.randrange(1, len(texts))
        sources = [list_source([texts[:cut]]), list_source([texts[cut:]])]
        sample = draw_sample(sources, byte_tokenizer, max_tokens, "")
        found = documents_of(sample)
        assert [token for document in found for token in document] == flat
        assert found[:-1] == everything[: len(found) - 1]
        assert (sample.num_tokens, sample.num_documents) == (max_tokens, len(found))


def test_a_sample_that_ends_with_a_document_has_no_empty_one(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source([[f"{number:04}" for number in range(50)]])
    sample = draw_sample([source], byte_tokenizer, 7 * 5, "")
    assert [len(tokens) for tokens in documents_of(sample)] == [5] * 7


def test_documents_are_drawn_from_the_whole_set(byte_tokenizer: Tokenizer, list_source: Any) -> None:
    # uniform over documents: the mean place of 400 of 4,000 is within 4 standard errors of the middle
    texts = make_texts(0, 4000)
    place: dict[tuple[int, ...], int] = {(*byte_tokenizer.encode(text), 0): n for n, text in enumerate(texts)}
    found = documents_of(draw_sample([list_source([texts])], byte_tokenizer, 16_000, ""))
    places = np.array([place[document] for document in found[:-1]])
    assert len(places) > 300
    assert abs(places.mean() - 2000) < 4 * 4000 / np.sqrt(12 * len(places))


def test_a_sample_is_kept_and_drawn_again_for_other_data(
    byte_tokenizer: Tokenizer, write_parquet: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    drawn = []
    draw = held_out.draw_sample
    monkeypatch.setattr(held_out, "draw_sample", lambda *given: drawn.append(1) or draw(*given))
    kept = tmp_path / "kept"
    source = ParquetSource(files=[str(write_parquet("a.parquet", make_texts(0, 300)))])
    first = documents_of(opened(source, byte_tokenizer, kept, 500))
    assert documents_of(opened(source, byte_tokenizer, kept, 500)) == first
    assert len(drawn) == 1
    other = ParquetSource(files=[str(write_parquet("b.parquet", make_texts(1, 300)))])
    other_tokenizer = Tokenizer(train_byte_level_bpe(["xx xx xx"], 260))
    changes: list[tuple[Source, Tokenizer, int, dict[str, Any]]] = [
        (other, byte_tokenizer, 500, {}),
        (source, other_tokenizer, 500, {}),
        (source, byte_tokenizer, 501, {}),
        (source, byte_tokenizer, 500, {"validation_documents": "held_out"}),
    ]
    for number, (changed, tokenizer, max_tokens, words) in enumerate(changes, 2):
        assert documents_of(opened(changed, tokenizer, kept, max_tokens, **words)) != first
        assert len(drawn) == number
    # a comparison: another run folder, where the same is drawn
    assert documents_of(opened(source, byte_tokenizer, tmp_path / "other", 500)) == first
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"\.npz is damaged .*delete it"):
        opened(source, byte_tokenizer, kept, 500)


def test_other_ranks_wait_for_the_main_rank(
    byte_tokenizer: Tokenizer, write_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    source = ParquetSource(files=[str(write_parquet("a.parquet", make_texts(0, 300)))])
    config = DataConfig(tokenizer="given", train=source, validation=source)
    found: list[DocumentSource] = []

    def wait() -> None:
        found.append(
            open_held_out(config, byte_tokenizer, max_tokens=500, kept_in=tmp_path, is_main_rank=False)
        )

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.2)
    assert not found
    main = opened(source, byte_tokenizer, tmp_path, 500)
    thread.join(timeout=10)
    assert documents_of(found[0]) == documents_of(main)


@pytest.fixture
def shards(byte_tokenizer: Tokenizer, list_source: Any, tmp_path: Path) -> ShardsSource:
    options = PrepareOptions(shard_tokens=9000)
    prepare(tmp_path / "shards", list_source([make_texts(3, 1000)]), byte_tokenizer, options)
    return ShardsSource(folder=str(tmp_path / "shards"))


def test_shards_are_sampled_from_their_index(
    shards: ShardsSource, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    everything = documents_of(opened(shards, byte_tokenizer, tmp_path / "kept", 1 << 40))
    assert sorted(everything) == sorted((*byte_tokenizer.encode(text), 0) for text in make_texts(3, 1000))
    numbers = [int(byte_tokenizer.decode(list(tokens[2:])).split()[0]) for tokens in everything]
    assert abs(np.mean(numbers[:200]) - 500) < 4 * 1000 / np.sqrt(12 * 200)
    for max_tokens in (1, 7, 1000, 1001):
        found = documents_of(opened(shards, byte_tokenizer, tmp_path / "kept", max_tokens))
        assert sum(map(len, found)) == DRAWN_PER_TOKEN * max_tokens
        assert found[:-1] == everything[: len(found) - 1]
        assert found[-1] == everything[len(found) - 1][: len(found[-1])]
    assert not (tmp_path / "kept").exists()


def test_a_mixture_is_sampled_as_the_union_of_its_sources(
    shards: ShardsSource, byte_tokenizer: Tokenizer, write_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    text = ParquetSource(files=[str(write_parquet("a.parquet", make_texts(0, 3000)))])
    mixture = MixtureSource(weights={"a": 0.99, "b": 0.01}, sources={"a": shards, "b": text})
    found = documents_of(opened(mixture, byte_tokenizer, tmp_path / "kept", 2500))
    assert sum(map(len, found)) == DRAWN_PER_TOKEN * 2500
    of_shards = sum(byte_tokenizer.decode(list(tokens)).startswith("3 ") for tokens in found[:-1])
    share = of_shards / (len(found) - 1)
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(found))
    assert documents_of(opened(mixture, byte_tokenizer, tmp_path / "other", 2500)) == found


def test_a_pass_over_the_hub_is_bounded() -> None:
    chosen = held_out._bounded(HubSource(parts="1-190"))
    assert isinstance(chosen, HubSource)
    assert len(chosen.file_names) == MAX_HUB_FILES
    assert set(chosen.file_names) <= set(HubSource(parts="1-190").file_names)
    few = HubSource(parts="1-8")
    assert held_out._bounded(few) is few
