"""What a launch says before anything is built."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config import load
from data.config import ParquetSource
from data.sources.open import open_text
from data.sources.split import is_held_out
from data.tokenizer import Tokenizer
from errors import UserError
from tests.training.launch import ROOT, arguments
from training.preflight import check_run, log_epochs, log_validation_documents
from training.run_config import RunConfig


@pytest.mark.parametrize(("rank", "documents"), [("0", "all"), ("1", "all"), ("0", "held_out")])
def test_the_main_rank_says_how_many_validation_documents_are_not_held_out(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rank: str,
    documents: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    overrides = [
        *("--data.validation.files", f'["{corpus / "train.parquet"}"]'),
        *("--data.train.files", f'["{corpus / "validation.parquet"}"]'),
        *("--data.validation_documents", documents),
    ]
    _, _, config_file, *words = arguments("debug_softmax_adamw", corpus, tmp_path / "run", *overrides)
    config = load(RunConfig, ROOT / config_file, words)
    caplog.set_level(logging.INFO, logger="parallax")
    check_run(config, 1)
    rows = open_text(ParquetSource(files=[str(corpus / "train.parquet")])).read(repeat=False)
    texts = [row.text for row in rows if row.text is not None]
    num_trained = sum(not is_held_out(text) for text in texts)
    assert 0 < num_trained < len(texts)
    said = f"{num_trained} of {len(texts)} documents of data.validation are not held out"
    assert (said in caplog.text) == (rank == "0" and documents == "all")


def test_a_launch_whose_validation_documents_are_all_held_out_says_nothing_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [text for text in (f"document {number}" for number in range(10_000)) if is_held_out(text)]
    assert texts
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    source = ["--data.validation.kind", "jsonl", "--data.validation.files", json.dumps([str(file)])]
    config = load(
        RunConfig,
        ROOT / "configs/debug_softmax_adamw.toml",
        [*source, "--data.validation_documents", "all"],
    )
    caplog.set_level(logging.INFO, logger="parallax")
    log_validation_documents(config)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("steps", "level", "said"),
    [(80, "INFO", "80 steps read 4.00 times"), (90, "WARNING", "90 steps read 4.5 times;")],
)
def test_a_launch_says_how_often_shards_are_read(
    steps: int, level: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--data.train.kind", "shards", "--data.train.folder", "x", "--training.steps", str(steps)]
    config = load(RunConfig, ROOT / "configs/debug_softmax_adamw.toml", words)
    manifest = SimpleNamespace(splits={"train": SimpleNamespace(tokens=20 * config.tokens_per_step)})
    monkeypatch.setattr("data.sources.count.read_manifest", lambda folder: manifest)
    caplog.set_level(logging.INFO, logger="parallax")
    log_epochs(config)
    (record,) = caplog.records
    assert record.levelname == level
    assert said in record.message


@pytest.mark.parametrize("table", ["train", "validation"])
def test_missing_shards_are_named_before_a_tokenizer_is_downloaded(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*others: Any, **options: Any) -> None:
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr(Tokenizer, "load", download)
    words = [f"--data.{table}.kind", "shards", f"--data.{table}.folder", str(tmp_path / "none")]
    config = load(
        RunConfig, ROOT / "configs/debug_softmax_adamw.toml", [*words, "--run.folder", str(tmp_path / "run")]
    )
    with pytest.raises(UserError, match=rf"^data.{table}: .*none.*data.shards prepare"):
        check_run(config, 1)


def test_a_run_does_not_start_in_the_folder_of_a_plan(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "plan.toml").touch()
    words = ["--run.folder", str(tmp_path / "mine")]
    config = load(RunConfig, ROOT / "configs/debug_softmax_adamw.toml", words)
    with pytest.raises(UserError, match=r"run.folder \(.*mine\) is that of a plan .*: give another run.name"):
        check_run(config, 1)
