"""A tokenizer whose regular expression backtracks without end: one line, from any process, and soon."""

import json
import pickle
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from data.shards import __main__ as shards
from data.tokenizer import Tokenizer
from errors import UserError, run_command

SLOW = tokenizers.Regex(r"(a|a)+b")
TEXT = "a" * 50 + "!"


def make(*, in_normalizer: bool = False) -> Tokenizer:
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    if in_normalizer:
        backend.normalizer = normalizers.Replace(SLOW, "")
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(SLOW, "isolated")
    return Tokenizer(backend, name="slow.json")


@pytest.mark.parametrize("in_normalizer", [False, True])
def test_the_error_names_the_tokenizer_and_the_text_and_travels_between_processes(
    in_normalizer: bool,
) -> None:
    tokenizer = make(in_normalizer=in_normalizer)
    assert tokenizer.encode("short") == tokenizer.encode_prompts(["short"])[0]
    for encode in (tokenizer.encode_batch, tokenizer.encode_prompts):
        started = time.monotonic()
        with pytest.raises(
            UserError, match=r"slow.json cannot encode a text that begins 'aa*' \(Onig"
        ) as raised:
            encode(["fine", TEXT, "also fine"])
        assert time.monotonic() - started < 20
        assert "\n" not in str(raised.value)
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_preparation_ends_in_one_line(
    tmp_path: Path, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    make().save(tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    words = ["prepare", "--files", f"{tmp_path}/a.jsonl", "--tokenizer", f"{tmp_path}/tokenizer.json"]
    words += ["--out", f"{tmp_path}/out", "--processes", f"{processes}"]
    assert run_command(lambda: shards.main(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1
    assert "' (Onig: Regex search error" in lines[0]
