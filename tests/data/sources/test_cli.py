"""Errors of a source name options where a command line describes it, and keys where a config does."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import train_tokenizer
from data.config import DatasetsSource, JsonlSource, ParquetSource, TextSource
from data.shards import __main__ as shards
from data.sources.open import open_text
from data.tokenizer import Tokenizer
from errors import UserError

MISTAKES = [
    ("--files no.parquet", "no file matches 'no.parquet' in --files of a parquet source"),
    ("--files a.jsonl a.jsonl", "is named twice in --files of a jsonl source"),
    (
        "--files a.parquet",
        "has no column 'content' (it has words): set --text-column to the one that holds the",
    ),
    ("--files a.parquet", 'or set --on-damaged-file to "skip"'),
    (
        "--files a.parquet --text-column words --min-score 1",
        "has no column 'score' (it has words): set --score",
    ),
    ("--files a.jsonl", "--text-column is 'text'"),
    (
        "--files bad.parquet",
        'the file is damaged; download or write it again, or set --on-damaged-file to "skip"',
    ),
    ("--files a.jsonl --text-column=", '--text-column is empty (""): give it a value'),
    (
        "--files a.jsonl --min-characters -1",
        "--min-characters must be at least 0 and at most 1000000000000; got",
    ),
    (
        "--files a.jsonl --min-characters 5 --max-characters 3",
        "--min-characters is 5 and --max-characters 3: want --min-characters <= --max-characters",
    ),
    ("--folder no", "--folder of a text source is 'no'"),
    ("--folder . --pattern /x", "--pattern of a text source is '/x'"),
    ("--folder . --pattern *.md", "matches --pattern '*.md'"),
    ("--folder . --text-column x", "--text-column given with --folder"),
    ("--parts 1-", "--parts is '1-': want part numbers"),
    ("--parts 1 --repository a/b", "but --repository is 'a/b': give --hub-files"),
    ("--hub-files a.txt", "--hub-files of a hub source has 'a.txt': want parquet files"),
    ("--hub-files a.parquet --repository a/b", "--revision is a commit of openbmb/Ultra-FineWeb"),
    ("--dataset no", "--dataset is 'no', which is neither a folder nor the name"),
    ("--dataset openbmb/Ultra-FineWeb", "use --parts of a source of kind"),
    ("--dataset data", "has no column 'text' (it has words): set --text-column to the one"),
]


@pytest.fixture
def _files(tmp_path: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "data").mkdir()
    for name in ("a.parquet", "data/a.parquet"):
        pq.write_table(pa.table({"words": ["some words"]}), tmp_path / name)
    (tmp_path / "a.jsonl").write_text('{"words": "some words"}\n')
    (tmp_path / "bad.parquet").write_text("no parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_an_error_of_a_source_names_the_option_that_was_typed(words: str, said: str) -> None:
    prepare = ["prepare", *words.split(), "--tokenizer", ".", "--processes", "0", "--out", "out"]
    train = [*words.split(), "--vocab-size", "300", "--out", "out"]
    for main, command in ((shards.main, prepare), (train_tokenizer.main, train)):
        with pytest.raises(UserError) as error:
            main(command)
        assert said in str(error.value)
    # and a config's key afterwards
    with pytest.raises(UserError, match=r"^text_column is empty"):
        JsonlSource(files=["a.jsonl"], text_column="")


@pytest.mark.usefixtures("_files")
def test_an_error_of_a_source_names_the_key_of_a_config() -> None:
    for source, said in (
        (ParquetSource(files=["no.parquet"]), "in files of a parquet source"),
        (
            ParquetSource(files=["a.parquet"]),
            "set text_column to the one that holds the text, or set on_damaged_f",
        ),
        (TextSource(folder="no"), "^folder of a text source"),
        (DatasetsSource(path="no"), "^path is 'no'"),
    ):
        with pytest.raises(UserError, match=said):
            open_text(source)
    with pytest.raises(UserError, match=r'^min_characters must be at least 0 and .*, or "none"; got -1'):
        TextSource(folder=".", min_characters=-1)
