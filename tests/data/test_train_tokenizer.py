import errno
import os
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import train_tokenizer
from data.config import ParquetSource
from data.sources.open import open_text
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_byte_level_bpe
from errors import run_command


def test_training_is_deterministic_and_reaches_the_vocabulary_size() -> None:
    texts = [f"the {index} quick brown foxes jump over {index * 7} lazy dogs" for index in range(300)]
    first, second = train_byte_level_bpe(texts, 300), train_byte_level_bpe(iter(texts), 300)
    assert first.to_str() == second.to_str()
    tokenizer = Tokenizer(first)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(texts[0])) < len(texts[0]) / 2


@pytest.mark.parametrize("vocab_size", [256, 10**12, 10**21])
def test_a_vocabulary_out_of_range_is_rejected(vocab_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"vocab_size is {vocab_size}, must be at least 257 .* at most 16777216"
    ):
        train_byte_level_bpe(["x"], vocab_size)


def test_words_and_runs_of_spaces_of_any_length_are_trained_on() -> None:
    started = time.monotonic()
    long = ["a" + " " * 1_000_000 + "b", "\n" * 1_000_000, "x" * 1_000_000, "ab" * 500_000]
    tokenizer = Tokenizer(train_byte_level_bpe(long, 300))
    assert time.monotonic() - started < 60
    assert all(len(tokenizer.encode(text)) < 20_000 for text in long)


def test_only_long_words_are_cut() -> None:
    words = ["words of text,\n\n  " * 1000, "x" * 10_000, " " * 5000 + "\t", "", "\u4e2d" * 4096]
    pieces = [list(train_tokenizer._cut_long_words(word)) for word in words]
    assert ["".join(each) for each in pieces] == words
    assert [len(each) for each in pieces] == [1, 3, 2, 1, 2]


def test_the_command_trains_on_parquet_and_writes_a_tokenizer_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["some words of text, words again", None, "", "more words"]
    pq.write_table(pa.table({"content": rows}), tmp_path / "a.parquet")
    words = ["--files", str(tmp_path / "*.parquet"), "--out", str(tmp_path / "out"), "--vocab-size"]
    train_tokenizer.main([*words, "262"])
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.vocab_size == 262
    assert tokenizer.decode(tokenizer.encode("some words, unseen ones too")) == "some words, unseen ones too"
    assert len(tokenizer.encode("words")) < 5
    assert run_command(lambda: train_tokenizer.main([*words, "100"])) == 2
    assert "error: vocab_size is 100, must be at least 257" in capsys.readouterr().err


def test_a_full_disk_leaves_the_tokenizer_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words of text"}\n')
    words = ["--files", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--vocab-size"]
    train_tokenizer.main([*words, "260"])
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run_command(lambda: train_tokenizer.main([*words, "262"])) == 2
    assert re.search(r"tokenizer.json cannot be written: .* are free", capsys.readouterr().err)
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]


def test_the_command_truncates_a_document_that_exceeds_max_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = "\u00e9t\u00e9 " * 1000
    for name, rows in (("first", [huge]), ("later", ["ab ab", huge])):
        pq.write_table(pa.table({"content": rows}), tmp_path / f"{name}.parquet")
        words = ["--files", str(tmp_path / f"{name}.parquet"), "--out", str(tmp_path / name)]
        train_tokenizer.main([*words, "--vocab-size", "262", "--max-bytes", "1000"])
        assert Tokenizer.load(tmp_path / name).vocab_size == 262
    later = open_text(ParquetSource(files=[str(tmp_path / "later.parquet")]))
    assert list(train_tokenizer._truncated(later, 7)) == ["ab ab", "\u00e9"]
    words += ["--vocab-size", "262", "--max-bytes", "0"]
    assert run_command(lambda: train_tokenizer.main(words)) == 2
    assert "--max-bytes is 0, must be at least 1" in capsys.readouterr().err


def test_the_command_reads_jsonl_and_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words of text"}\n')
    (tmp_path / "a.txt").write_text("some words of text")
    for words in (["--files", str(tmp_path / "a.jsonl")], ["--folder", str(tmp_path)]):
        out = tmp_path / words[0].strip("-")
        train_tokenizer.main([*words, "--out", str(out), "--vocab-size", "260"])
        assert Tokenizer.load(out).vocab_size == 260
