"""Bytes of the text as written in every mode, and nothing skipped or cut without a count."""

import json
import math
import random
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data.config import JsonlSource, ShardsSource
from data.shards import __main__ as shards
from data.sources.base import DocumentSource
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from eval.scored_text import Mode, read_texts
from eval.scoring.language_model import Qwen3Model
from eval.text_loss import TextLoss, format_result, text_loss
from tests.conftest import make_text
from tests.eval.conftest import build
from tests.eval.test_text_loss import GreedyModel, documents

E_ACUTE, NFD_E_ACUTE = "\u00e9", "e\u0301"


@pytest.fixture
def nfc_tokenizer() -> Tokenizer:
    """A byte-level tokenizer behind NFC; "\u00e9" is one token, other letters are their bytes."""
    spelled = "".join(p for p, _ in _byte_level().pre_tokenize_str(E_ACUTE))
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), spelled]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[(spelled[0], spelled[1])]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _byte_level()
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("text", "num_first_bytes"),
    [
        ("abc", 1),
        (f"{E_ACUTE}a", 2),
        (f"{NFD_E_ACUTE}a", 3),
        # its first token is the first of three bytes
        ("\u5317\u4eac", 1),
        # NFC makes "o" and a circumflex one letter of two bytes, whose first byte is a token
        ("o\u0302a", 1),
        ("\U0001f600", 1),
        ("a", 1),
    ],
)
def test_the_first_token_covers_bytes_of_the_text_as_written(
    nfc_tokenizer: Tokenizer, text: str, num_first_bytes: int
) -> None:
    assert nfc_tokenizer.num_first_bytes(text, nfc_tokenizer.encode(text)[0]) == num_first_bytes


@pytest.mark.parametrize("seed", range(20))
def test_bits_per_byte_have_one_denominator_in_all_modes_and_forms(
    tmp_path: Path, nfc_tokenizer: Tokenizer, seed: int
) -> None:
    drawn = random.Random(seed)
    letters = "abc \u00e9\u00e8\u00f4\u5317\U0001f600"
    nfc = "".join(drawn.choices(letters, k=30)).strip() + " x\u00e9\u00e8z"
    nfd = unicodedata.normalize("NFD", nfc)
    model = GreedyModel(0)  # 1 nat per token
    for text in (nfc, nfd):
        ids = nfc_tokenizer.encode(text)
        opened = documents(tmp_path, [text], nfc_tokenizer)
        found = {
            mode: text_loss(model, nfc_tokenizer, opened, mode=mode) for mode in ("documents", "wikitext")
        }
        num_first = nfc_tokenizer.num_first_bytes(text, ids[0])
        # the first token is not predicted in documents mode
        assert found["wikitext"].num_bytes == len(text.encode())
        assert found["documents"].num_bytes == len(text.encode()) - num_first
        for each, num_tokens in ((found["wikitext"], len(ids)), (found["documents"], len(ids) - 1)):
            assert each.bits_per_byte == pytest.approx(num_tokens / math.log(2) / each.num_bytes)
            assert each.bytes_of == "text"
    assert nfc_tokenizer.encode(nfd) == nfc_tokenizer.encode(nfc)


def test_a_first_word_longer_than_the_head_that_is_looked_at(tokenizer: Tokenizer) -> None:
    for text in ("x" * 5000, " " * 400 + "a", make_text(1, 3)):
        ids = tokenizer.encode(text)
        expected = len(tokenizer.decode(ids[:1]).encode())
        assert tokenizer.num_first_bytes(text, ids[0]) == expected


def test_bits_per_byte_of_shards_say_that_their_bytes_are_those_of_the_tokens(
    tmp_path: Path, nfc_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    nfc_tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"a{NFD_E_ACUTE}b"}) + "\n")
    words = ["prepare", "--files", f"{tmp_path}/a.jsonl", "--tokenizer", f"{tmp_path}/tokenizer.json"]
    shards.main([*words, "--out", f"{tmp_path}/out", "--processes", "0"])
    source = ShardsSource(folder=f"{tmp_path}/out")
    opened = open_source(source, tokenizer_fingerprint=nfc_tokenizer.fingerprint, split="all")
    found = text_loss(GreedyModel(0), nfc_tokenizer, opened)
    assert (found.num_bytes, found.bytes_of) == (len(f"{E_ACUTE}b".encode()), "tokens")
    assert "bits/byte of the decoded tokens" in format_result(found)


def last_words(folder: Path, texts: list[str], tokenizer: Tokenizer) -> TextLoss:
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size), max_length=96)
    return text_loss(model, tokenizer, documents(folder, texts, tokenizer), mode="last-word")


@pytest.mark.parametrize("seed", range(5))
def test_white_space_behind_the_last_word_is_dropped(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    drawn = random.Random(seed)
    texts = [make_text(10 * seed + each, 4) for each in range(3)]
    spaced = [text + "".join(drawn.choices(" \n\t\u00a0", k=drawn.randrange(4))) for text in texts]
    found, expected = last_words(tmp_path, spaced, tokenizer), last_words(tmp_path, texts, tokenizer)
    assert found == expected
    assert found.num_bytes == sum(len(" " + text.split()[-1]) for text in texts)


def test_documents_without_a_last_word_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the model reads", "one ", "  one", "a\nlast", "", "   "]
    found = last_words(tmp_path, texts, tokenizer)
    assert found.skipped == {"one_word": 2, "empty": 2}
    assert found.num_documents == 2
    assert found.num_bytes == len(" reads") + len("\nlast")
    assert "skipped: 2 one_word, 2 empty" in format_result(found)


def test_a_token_across_the_start_of_the_last_word_is_predicted(tmp_path: Path) -> None:
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "x\u0120", "x\u0120y"]
    merges = [("x", "\u0120"), ("x\u0120", "y")]
    backend = Backend(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=merges))
    backend.pre_tokenizer, backend.decoder = _byte_level(), decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    (text,) = read_texts(documents(tmp_path, ["a x y"], tokenizer), tokenizer, "last-word", Counter())
    assert tokenizer.decode(text.tokens[text.first_predicted :]) == "x y"


@pytest.mark.parametrize("mode", get_args(Mode))
def test_skipped_rows_and_documents_that_do_not_fit_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, mode: Mode
) -> None:
    # of every length around that of a window
    texts = ["0 " + "123456789"[:number] for number in range(2, 10)]
    path = tmp_path / "texts.jsonl"
    rows = [*(json.dumps({"text": text}) for text in texts), '{"text": null}', "{", '{"text": "\\ud83d"}']
    path.write_text("\n".join(rows) + "\n")
    opened = open_source(
        JsonlSource(files=[str(path)]), tokenizer_fingerprint=tokenizer.fingerprint, split="all"
    )
    found = text_loss(GreedyModel(0), tokenizer, opened, mode=mode)
    assert found.skipped == {"null": 1, "malformed": 1, "not_text": 1}
    # of the rows up to the last document that is read
    assert text_loss(GreedyModel(0), tokenizer, opened, mode=mode, limit=8).skipped == {}
    # max_length is 8, and the last token is no input; documents and pages have the end-of-document token too
    lengths = [len(ids) + (mode != "last-word") for ids in tokenizer.encode_batch(texts)]
    assert found.num_cut_documents == sum(length > 9 for length in lengths) > 0
    assert f"{found.num_cut_documents} of 8 documents are longer" in format_result(found)


def test_a_document_of_one_token_is_counted(tmp_path: Path, nfc_tokenizer: Tokenizer) -> None:
    # the end-of-document token is predicted after "a", nothing is where the normalizer leaves nothing
    backend = Backend.from_str(nfc_tokenizer._backend.to_str())
    backend.normalizer = normalizers.Replace("~", "")
    tokenizer = Tokenizer(backend)
    opened = documents(tmp_path, ["a", "~", "ab"], tokenizer)
    assert text_loss(GreedyModel(0), tokenizer, opened).skipped == {"no_token": 1}
    assert text_loss(GreedyModel(0), tokenizer, opened, mode="wikitext").skipped == {"no_token": 1}


def test_limit_and_max_tokens_read_the_first_documents_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [make_text(seed, 3 + seed % 4) for seed in range(12)]
    model = Qwen3Model(build(), max_length=64)

    def run(number: int = 12, **options: Any) -> TextLoss:
        return text_loss(model, tokenizer, documents(tmp_path, texts[:number], tokenizer), **options)

    # the end-of-document token is predicted, the first token is not
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert run(limit=5) == run(5)
    assert run(max_tokens=sum(lengths[:5])) == run(5)
    assert run(max_tokens=sum(lengths[:5]) + 1) == run(6)
    assert run(max_tokens=1) == run(1)
    assert run(limit=3, max_tokens=sum(lengths)) == run(3)
    assert run(limit=99, max_tokens=10**9) == run()


def source_of(folder: Path, tokenizer: Tokenizer) -> DocumentSource:
    return documents(folder, [make_text(seed, 6) for seed in range(40)], tokenizer)
