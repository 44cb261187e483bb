"""Opening the sources of the [data] table, and checking them before anything is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from data.config import (
    DataConfig,
    DatasetsSource,
    HubSource,
    JsonlSource,
    MixtureSource,
    ParquetSource,
    ShardsSource,
    Source,
    TextSource,
)
from data.shards.prepare import PrepareOptions, prepare
from data.sources.open import check_data, open_source, open_text
from data.sources.split import is_held_out
from data.titan import build_dataloader, build_validation_loader
from data.tokenizer import Tokenizer
from data.ultra_fineweb import part_files
from errors import UserError

TEXTS = [f"document {index}" for index in range(120)]
HELD_OUT = [text for text in TEXTS if is_held_out(text)]


@pytest.fixture
def kinds(tmp_path: Path, write_parquet: Callable[..., Path], byte_tokenizer: Tokenizer) -> dict[str, Source]:
    """The same documents as every kind of local source."""
    write_parquet("a.parquet", TEXTS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "text").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{index:03}.txt").write_text(text)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    sources: dict[str, Any] = {
        "parquet": ParquetSource(files=[str(tmp_path / "a.parquet")]),
        "jsonl": JsonlSource(files=[str(tmp_path / "a.jsonl")]),
        "text": TextSource(folder=str(tmp_path / "text")),
        "datasets": DatasetsSource(path=str(tmp_path / "saved")),
        "shards": ShardsSource(folder=str(tmp_path / "shards")),
    }
    prepare(
        tmp_path / "shards", open_text(sources["parquet"]), byte_tokenizer, PrepareOptions(shard_tokens=500)
    )
    sources["mixture"] = MixtureSource(weights={"own": 1.0}, sources={"own": sources["text"]})
    return sources


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text", "datasets", "shards", "mixture"])
def test_every_kind_yields_the_same_documents_and_the_same_split(
    kinds: dict[str, Source], kind: str, byte_tokenizer: Tokenizer
) -> None:
    for split, expected in (
        ("all", TEXTS),
        ("train", [text for text in TEXTS if text not in HELD_OUT]),
        ("held_out", HELD_OUT),
    ):
        source = open_source(
            kinds[kind],
            tokenizer_fingerprint=byte_tokenizer.fingerprint,
            split=split,  # type: ignore[arg-type]
        )
        texts = [
            row.text if row.tokens is None else byte_tokenizer.decode(row.tokens[:-1].tolist())
            for row in source.read(repeat=False)
            if row.skipped is None
        ]
        assert sorted(map(str, texts)) == sorted(expected)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "text", "datasets", "shards", "mixture"])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_run_trains_on_every_kind_and_never_on_what_it_validates_on(
    kinds: dict[str, Source], kind: str, packing: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = DataConfig(
        tokenizer="given",
        train=kinds[kind],
        validation=kinds[kind],
        validation_documents="held_out",
        packing=packing,
        shuffle_seed=0,
    )
    check_data(config, byte_tokenizer.fingerprint)
    sizes: Any = {"seq_len": 64, "local_batch_size": 1, "dp_rank": 0, "dp_world_size": 1}
    training = build_dataloader(config, tokenizer=byte_tokenizer, global_batch_size=2, **sizes)
    # all of them, and a sample of more tokens than there are
    validations = [
        build_validation_loader(
            config, tokenizer=byte_tokenizer, max_tokens=max_tokens, kept_in=tmp_path, **sizes
        )
        for max_tokens in (None, 1 << 20)
    ]
    seen = ""
    # a best-fit row ends with a document, whose last token is a label only
    end = "<|endoftext|>" if packing == "best_fit" else ""
    for (batch, _), _ in zip(training, range(90 if packing == "concatenate" else 530), strict=False):
        seen += byte_tokenizer.decode(batch["input"][0].tolist()) + end
    training.close()
    documents = set(seen.split("<|endoftext|>")[1:-1])
    assert set(TEXTS) - set(HELD_OUT) <= documents
    assert not documents & set(HELD_OUT)
    for validation in validations:
        held_out = "".join(byte_tokenizer.decode(batch.inputs["input"][0].tolist()) for batch in validation)
        assert set(held_out.split("<|endoftext|>")) - {""} == set(HELD_OUT)


def test_validating_on_the_training_documents_is_rejected(
    kinds: dict[str, Source], byte_tokenizer: Tokenizer, tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    for kind, source in kinds.items():
        config = DataConfig(tokenizer="given", train=source, validation=source)
        with pytest.raises(UserError) as error:
            check_data(config, byte_tokenizer.fingerprint)
        assert 'validation_documents is "all", but data.train reads' in str(error.value), kind
    other = ParquetSource(files=[str(write_parquet("validation.parquet", TEXTS))])
    check_data(DataConfig(tokenizer="given", train=kinds["text"], validation=other), "")
    hub = HubSource(parts="1-3")
    both = DataConfig(tokenizer="given", train=hub, validation=HubSource(parts="3"))
    with pytest.raises(ValueError, match="part-0003-of-2048"):
        check_data(both, "")
    check_data(DataConfig(tokenizer="given", train=hub, validation=HubSource(parts="4")), "")


def test_check_data_finds_a_source_that_cannot_be_opened(tmp_path: Path) -> None:
    good = TextSource(folder=str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    for bad, message in (
        (ParquetSource(files=["nowhere.parquet"]), "no file matches 'nowhere.parquet'"),
        (ShardsSource(folder=str(tmp_path)), "holds no complete set of shards"),
        (MixtureSource(weights={"a": 1}, sources={"a": JsonlSource(files=["b.jsonl"])}), r"b\.jsonl"),
    ):
        for name, config in (
            ("train", DataConfig(tokenizer="given", train=bad)),
            ("validation", DataConfig(tokenizer="given", train=good, validation=bad)),
        ):
            with pytest.raises(ValueError, match=rf"^data\.{name}: .*{message}"):
                check_data(config, "")


def test_check_data_finds_a_source_without_a_document(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"body": "text"}\n' * 3)
    (tmp_path / "empty.jsonl").write_text("")
    for name, skipped in (("empty", "none"), ("lines", "3 null")):
        source = JsonlSource(files=[str(tmp_path / f"{name}.jsonl")])
        message = rf"^data\.train: .*holds no document \(rows skipped: {skipped}; text_column is 'text'\)"
        with pytest.raises(ValueError, match=message):
            check_data(DataConfig(tokenizer="given", train=source), "")


def test_parts_of_ultra_fineweb_are_named_without_a_listing() -> None:
    names = part_files("en", "1-3, 2048")
    assert names[0] == "data/ultrafineweb_en/ultrafineweb-en-part-0001-of-2048.parquet"
    assert [name[-20:] for name in names[1:]] == [f"{number:04}-of-2048.parquet" for number in (2, 3, 2048)]
    assert part_files("zh", "7") == ["data/ultrafineweb_zh/ultrafineweb-zh-part-007-of-256.parquet"]
    for parts in ("", "0", "2049", "3-1", "1,1", "1-3,2", "one", "1-", "-1", "1.5"):
        with pytest.raises(ValueError, match=r"parts is .*want"):
            part_files("en", parts)


def test_a_hub_source_takes_either_files_or_parts() -> None:
    assert HubSource(files=["a/b.parquet"]).file_names == ["a/b.parquet"]
    assert len(HubSource(parts="1-20").file_names) == 20
    for arguments, message in (
        ({}, "either files or parts"),
        ({"files": ["a.parquet"], "parts": "1"}, "either files or parts"),
        ({"files": []}, r"files of a hub source is \[\]: name at least one"),
        ({"files": ["a.parquet", "b.parquet", "a.parquet"]}, r"has 'a\.parquet' twice"),
        ({"files": ["a.csv"]}, r"'a\.csv': want parquet"),
        ({"parts": "1", "repository": "own/set"}, "parts names files of openbmb/Ultra-FineWeb"),
        ({"files": ["a.parquet"], "repository": "own/set"}, "give a commit of that repository"),
        ({"parts": "2049"}, "numbers from 1 to 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            HubSource(**arguments)  # pyrefly: ignore [bad-argument-type]
