"""What a launch says before anything is built."""

import logging
from pathlib import Path

import pytest

from config import load
from data.config import ParquetSource
from data.sources.open import open_text
from data.sources.split import is_held_out
from tests.training.launch import ROOT, arguments
from training.preflight import check_run
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
