"""A saved position names what changed: each file, and each key of the sources."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import JsonlSource, MixtureSource, ParquetSource, Source, TextSource
from data.fingerprint import describe_changes, fingerprint_files, parts_of
from data.loading.loader import PackedLoader
from data.sources.open import open_source
from data.tokenizer import Tokenizer

TEXTS = [f"document {index}" for index in range(30)]


def _write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _write_parquet(path: Path, texts: list[str]) -> None:
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"content": texts}), path, **options)


def _write_texts(folder: Path, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    for index, text in enumerate(texts):
        (folder / f"{index:02}.txt").write_text(text)


@pytest.fixture
def resume(byte_tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., None]:
    """Train on one source for a few batches, call a change, and resume on another."""

    def loader(source: Source, seed: int | None) -> PackedLoader:
        opened = open_source(
            source, tokenizer_fingerprint=byte_tokenizer.fingerprint, split="train", shuffle_seed=seed
        )
        sizes = {"seq_len": 16, "local_batch_size": 1, "global_batch_size": 1}
        ranks = {"dp_rank": 0, "dp_world_size": 1}
        return PackedLoader(opened, byte_tokenizer, **sizes, **ranks, prefetch_batches=0)

    def run(
        first: Source,
        second: Source | None = None,
        change: Callable[[], object] = lambda: None,
        seed: int | None = 0,
    ) -> None:
        before = loader(first, 0)
        batches = iter(before)
        for _ in range(3):
            next(batches)
        state = json.loads(json.dumps(before.state_dict()))
        loader(first, 0).load_state_dict(state)
        change()
        loader(first if second is None else second, seed).load_state_dict(state)

    return run


def test_a_file_that_is_edited_in_place_is_refused_by_name(
    resume: Callable[..., None], tmp_path: Path
) -> None:
    edited = [*TEXTS[:14], "DOCUMENT 14", *TEXTS[15:]]
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "a.parquet", "b.parquet")]
    for path in paths:
        (_write_jsonl if path.suffix == ".jsonl" else _write_parquet)(path, TEXTS)
    _write_texts(tmp_path / "texts", TEXTS)
    kinds: list[tuple[Source, Path, Callable[[], None], str]] = [
        (
            JsonlSource(files=[str(path) for path in paths[:2]]),
            paths[1],
            lambda: _write_jsonl(paths[1], edited),
            "b.jsonl",
        ),
        (
            ParquetSource(files=[str(path) for path in paths[2:]]),
            paths[3],
            lambda: _write_parquet(paths[3], edited),
            "b.parquet",
        ),
        (
            TextSource(folder=str(tmp_path / "texts")),
            tmp_path / "texts" / "14.txt",
            lambda: _write_texts(tmp_path / "texts", edited),
            "14.txt",
        ),
    ]
    for source, path, change, name in kinds:
        size = path.stat().st_size
        message = rf"another source \({name} changed\): restore data.train and data.shuffle_seed, or start"
        with pytest.raises(ValueError, match=message):
            resume(source, change=change)
        assert path.stat().st_size == size
        resume(source)


def test_a_changed_key_is_named_also_in_a_mixture(resume: Callable[..., None], tmp_path: Path) -> None:
    for name in "abcdef":
        _write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
    _write_parquet(tmp_path / "a.parquet", TEXTS)

    def files(names: str, **options: Any) -> JsonlSource:
        return JsonlSource(files=[str(tmp_path / f"{name}.jsonl") for name in names], **options)

    def mixture(first: JsonlSource, weight: float = 1.0) -> MixtureSource:
        return MixtureSource(weights={"one": weight, "two": 2.0}, sources={"one": first, "two": files("f")})

    cases: list[tuple[Source, Source, int | None, str]] = [
        (files("ab"), files("ab"), 1, "shuffle_seed was 0 and is 1"),
        (files("ab"), files("ab"), None, "shuffle_seed was 0 and is None"),
        (files("ab"), files("ab", min_characters=3), 0, "min_characters was None and is 3"),
        (files("ab"), files("ba"), 0, "the files are in another order"),
        (files("ab"), files("abc"), 0, r"c\.jsonl added"),
        (files("abc"), files("ac"), 0, r"b\.jsonl left out"),
        (files("a"), files("bcdef"), 0, r"a\.jsonl left out; b\.jsonl, c\.jsonl, d\.jsonl and 2 more added"),
        (
            files("a"),
            ParquetSource(files=[str(tmp_path / "a.parquet")]),
            0,
            "kind was 'jsonl' and is 'parquet'",
        ),
        (files("a"), mixture(files("a")), 0, "kind was 'jsonl' and is 'mixture'"),
        (mixture(files("a")), mixture(files("a"), 3.0), 0, r"weights\.one was 1\.0 and is 3\.0"),
        (mixture(files("a")), mixture(files("ab")), 0, r"b\.jsonl added"),
        (
            mixture(files("a")),
            mixture(files("a", max_characters=99)),
            0,
            r"sources\.one\.max_characters was None and is 99",
        ),
    ]
    for first, second, seed, message in cases:
        with pytest.raises(ValueError, match=rf"belongs to another source \({message}\): "):
            resume(first, second, seed=seed)
    # what changes no row may change
    resume(files("ab"), files("ab", on_damaged_file="skip"))


def test_the_parts_of_many_files_are_small_and_tell_about_where_a_file_changed() -> None:
    draw = random.Random(0)
    identities = [
        [f"data/ultrafineweb-part-{number:05}.parquet", "0123456789abcdef"] for number in range(20_000)
    ]
    parts = fingerprint_files(identities)
    assert len(json.dumps(parts)) < 150_000
    for _ in range(20):
        number = draw.randrange(len(identities))
        changed = [list(identity) for identity in identities]
        changed[number][1] = "f" * 16
        (line,) = describe_changes(parts, fingerprint_files(changed))
        first, last = (int(name[-13:-8]) for name in line.removesuffix(" changed").split(" to "))
        assert first <= number <= last < first + 20
    assert len(fingerprint_files(identities[:1024])["files"]) == 1024


def test_files_of_one_name_are_told_apart() -> None:
    identities = [["a.jsonl", "0"], ["b.jsonl", "1"], ["a.jsonl", "2"]]
    changed = [*identities[:2], ["a.jsonl", "3"]]
    assert describe_changes(fingerprint_files(identities), fingerprint_files(changed)) == [
        "a.jsonl (file 3) changed"
    ]


def test_a_position_of_an_earlier_version_is_accepted_with_a_warning(
    byte_tokenizer: Tokenizer, list_source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"seq_len": 16, "local_batch_size": 1, "global_batch_size": 1, "dp_rank": 0, "dp_world_size": 1}
    loader = PackedLoader(list_source([TEXTS]), byte_tokenizer, **sizes)
    state = loader.state_dict()
    assert parts_of(state["fingerprint"]["source"])["shuffle_seed"] is None
    older = {
        **state["fingerprint"],
        "source": "0123456789abcdef",
        "tokenizer": byte_tokenizer.fingerprint[:16],
    }
    loader.load_state_dict({**state, "fingerprint": older})
    assert "of an earlier version: its source was compared only in part" in caplog.text
    assert "of an earlier version: its tokenizer was compared only in part" in caplog.text
    with pytest.raises(ValueError, match="belongs to another tokenizer"):
        loader.load_state_dict({**state, "fingerprint": {**older, "tokenizer": "0123456789abcdef"}})


def test_files_of_one_name_that_are_swapped_are_in_another_order() -> None:
    one, other = ["a.jsonl", "1234"], ["a.jsonl", "5678"]
    saved, current = fingerprint_files([one, other]), fingerprint_files([other, one])
    assert describe_changes(saved, current) == ["the files are in another order"]
    assert describe_changes(saved, fingerprint_files([one, one])) == ["a.jsonl (file 2) changed"]
