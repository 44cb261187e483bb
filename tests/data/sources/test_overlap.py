"""Validation on documents that training reads, under any name and also through shards."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from data.config import (
    DataConfig,
    DatasetsSource,
    HubSource,
    JsonlSource,
    LeafSource,
    MixtureSource,
    ParquetSource,
    ShardsSource,
    Source,
    TextSource,
)
from data.shards import __main__ as shards
from data.sources.count import count_epochs, count_not_held_out
from data.sources.open import check_data
from data.sources.overlap import check_overlap
from data.sources.shard_format import MANIFEST_FILE, read_manifest
from data.sources.split import is_held_out
from data.tokenizer import Tokenizer

TEXTS = [f"document {index}" for index in range(200)]
NOT_HELD_OUT = [text for text in TEXTS if not is_held_out(text)]


@pytest.fixture
def sources(
    tmp_path: Path,
    byte_tokenizer: Tokenizer,
    write_parquet: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, LeafSource]:
    """Sources of text with the shards that were made from them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    write_parquet("d.parquet", TEXTS)
    (tmp_path / "texts").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{index}.txt").write_text(text)
    found: dict[str, LeafSource] = {
        "jsonl": JsonlSource(files=["d.jsonl"]),
        "parquet": ParquetSource(files=["d.parquet"]),
        "text": TextSource(folder="texts"),
    }
    for kind in [*found]:
        words = ["--folder", "texts"] if kind == "text" else ["--files", f"d.{kind}"]
        command = ["prepare", "--tokenizer", "tokenizer.json", "--processes", "0", "--out", f"{kind}_shards"]
        assert shards.main([*command, *words]) == 0
        found[f"{kind}_shards"] = ShardsSource(folder=f"{kind}_shards")
    return found


def _check(train: Source, validation: Source, tokenizer: Tokenizer, documents: str = "all") -> None:
    config = DataConfig(
        tokenizer="given",
        train=train,
        validation=validation,
        validation_documents=documents,  # pyrefly: ignore [bad-argument-type]
    )
    check_data(config, tokenizer.fingerprint)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_validating_on_the_files_of_the_training_shards_is_refused(
    sources: dict[str, LeafSource], kind: str, byte_tokenizer: Tokenizer
) -> None:
    text, prepared = sources[kind], sources[f"{kind}_shards"]
    mixture = MixtureSource(weights={"a": 1.0, "b": 1.0}, sources={"a": prepared, "b": sources["text"]})
    for train, validation in ((prepared, text), (text, prepared), (mixture, text), (prepared, prepared)):
        with pytest.raises(
            ValueError, match=rf'validation_documents is "all", but .* reads .*(d\.{kind}|text|{kind}_shards)'
        ):
            _check(train, validation, byte_tokenizer)
        _check(train, validation, byte_tokenizer, "held_out")
    for other in {"jsonl", "parquet", "text"} - {kind}:
        _check(prepared, sources[other], byte_tokenizer)


def test_a_copy_of_another_name_is_recognized(
    sources: dict[str, LeafSource], byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copy("d.jsonl", "copy.jsonl")
    copy = JsonlSource(files=["copy.jsonl"])
    for train in (sources["jsonl"], sources["jsonl_shards"]):
        with pytest.raises(ValueError, match=r"data\.train reads copy\.jsonl too"):
            _check(train, copy, byte_tokenizer)
    Path("copy.jsonl").write_text(Path("d.jsonl").read_text().replace("document 7", "DOCUMENT 7"))
    for train in (sources["jsonl"], sources["jsonl_shards"]):
        _check(train, copy, byte_tokenizer)
    # a text file is one document, which may occur twice
    shutil.copytree("texts", "more")
    _check(sources["text"], TextSource(folder="more"), byte_tokenizer)


def _saved_copy(folder: str) -> None:
    datasets.Dataset.from_list([{"text": text} for text in TEXTS]).save_to_disk(folder)


def test_a_local_dataset_is_known_by_its_data_files(
    sources: dict[str, LeafSource],
    byte_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    datasets.disable_progress_bars()
    for folder in ("folder", "copy"):
        Path(folder).mkdir()
        shutil.copy("d.jsonl", f"{folder}/train.jsonl")
        _saved_copy(f"{folder}_saved")
    found: dict[str, LeafSource] = {name: DatasetsSource(path=name) for name in ("folder", "copy")}
    command = ["prepare", "--tokenizer", "tokenizer.json", "--processes", "0", "--out", "dataset_shards"]
    assert shards.main([*command, "--dataset", "folder"]) == 0
    found["shards"] = ShardsSource(folder="dataset_shards")
    for train, validation in itertools.permutations([*found.values(), sources["jsonl"]], 2):
        with pytest.raises(ValueError, match=r"but data\.train reads .* too"):
            _check(train, validation, byte_tokenizer)
    saved, saved_copy = (DatasetsSource(path=f"{folder}_saved") for folder in ("folder", "copy"))
    with pytest.raises(ValueError, match=r"but data\.train reads .*copy_saved.* too"):
        _check(saved, saved_copy, byte_tokenizer)
    for other in (sources["parquet"], sources["text"], saved):
        _check(found["shards"], other, byte_tokenizer)
    # of shards alone, what they were made from may be gone
    shutil.rmtree("folder")
    Path("folder").mkdir()
    _check(found["shards"], sources["jsonl"], byte_tokenizer)


def test_a_repository_of_the_hub_is_one_whatever_reads_it() -> None:
    files = HubSource(repository="some/set", revision="0123abc", files=["a.parquet"])
    whole, other = DatasetsSource(path="Some/Set"), DatasetsSource(path="another/set")
    for train, validation in ((files, whole), (whole, files), (whole, whole)):
        with pytest.raises(ValueError, match=r"but data\.train reads some/set"):
            check_overlap(DataConfig(tokenizer="given", train=train, validation=validation))
    for train, validation in ((files, other), (other, files), (whole, other)):
        check_overlap(DataConfig(tokenizer="given", train=train, validation=validation))


def test_shards_of_an_earlier_version_and_of_the_hub_name_their_files(
    sources: dict[str, LeafSource], byte_tokenizer: Tokenizer
) -> None:
    path = Path("jsonl_shards") / MANIFEST_FILE
    table = json.loads(path.read_text())
    del table["sources"]
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"data\.train reads .*d\.jsonl too"):
        _check(sources["jsonl_shards"], sources["jsonl"], byte_tokenizer)
    table["settings"]["source"] = {
        "kind": "hub",
        "repository": HubSource(parts="1").repository,
        "files": None,
        "language": "en",
        "parts": "1-3",
    }
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"part-0003-of-2048\.parquet too"):
        _check(sources["jsonl_shards"], HubSource(parts="3-5"), byte_tokenizer)
    _check(sources["jsonl_shards"], HubSource(parts="4-5"), byte_tokenizer)


def test_epochs_of_shards_are_counted(sources: dict[str, LeafSource]) -> None:
    size = read_manifest(Path("jsonl_shards")).splits["train"].tokens
    assert count_epochs(sources["jsonl_shards"], 3 * size) == {"jsonl_shards": (size, 3.0)}
    both = {name: sources[name] for name in ("jsonl", "jsonl_shards")}
    mixture = MixtureSource(weights={"jsonl": 3.0, "jsonl_shards": 1.0}, sources=both)
    assert count_epochs(mixture, 2 * size) == {"jsonl_shards": (size, 0.5)}
    twice = MixtureSource(
        weights={"a": 3.0, "b": 1.0}, sources=dict.fromkeys(("a", "b"), sources["jsonl_shards"])
    )
    assert count_epochs(twice, 2 * size) == {"jsonl_shards": (size, 2.0)}
    assert count_epochs(sources["jsonl"], size) == {}


def test_validation_documents_that_are_not_held_out_are_counted(
    sources: dict[str, LeafSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < len(NOT_HELD_OUT) < len(TEXTS)
    for source in sources.values():
        assert count_not_held_out(source) == (len(NOT_HELD_OUT), len(TEXTS))
    both = {name: sources[name] for name in ("jsonl", "text_shards")}
    mixture = MixtureSource(weights=dict.fromkeys(both, 1.0), sources=both)
    assert count_not_held_out(mixture) == (2 * len(NOT_HELD_OUT), 2 * len(TEXTS))
    assert count_not_held_out(HubSource(parts="1")) == (0, 0)
    monkeypatch.setattr("data.sources.count._MAX_COUNTED", 10)
    assert count_not_held_out(sources["jsonl"]) == (sum(text in NOT_HELD_OUT for text in TEXTS[:10]), 10)
