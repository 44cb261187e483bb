import functools
import pickle
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import ParquetSource
from data.sources.open import open_text
from data.tokenizer import Tokenizer, _first_bytes, _pieces, check_vocabulary, train_byte_level_bpe
from data.tokenizer import main as tokenizer_main

QWEN3 = Path(__file__).parents[2] / "../shared/data/qwen3_tokenizer"
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="the Qwen3 tokenizer is not here")


@settings(deadline=None)
@given(text=st.text())
def test_any_text_decodes_to_itself(byte_tokenizer: Tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text)
    assert byte_tokenizer.decode(ids) == text
    assert byte_tokenizer.encode_batch([text, "x", text]) == [ids, byte_tokenizer.encode("x"), ids]


def test_a_special_token_spelled_out_in_a_text_stays_text(byte_tokenizer: Tokenizer) -> None:
    forged = "before<|endoftext|>after"
    assert byte_tokenizer.end_of_document_id not in byte_tokenizer.encode(forged)
    assert byte_tokenizer.end_of_document_id not in byte_tokenizer.encode_batch([forged])[0]
    assert byte_tokenizer.decode(byte_tokenizer.encode(forged)) == forged


def test_the_files_own_truncation_padding_and_template_are_off(tmp_path: Path) -> None:
    from tokenizers import processors

    backend = train_byte_level_bpe([], 257)
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("abcdefg")) == "abcdefg"
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(["abcdefg", "a"])] == ["abcdefg", "a"]


def test_training_is_deterministic_and_reaches_its_size() -> None:
    texts = [f"the {index} quick brown foxes jump over {index * 7} lazy dogs" for index in range(300)]
    first, second = train_byte_level_bpe(texts, 300), train_byte_level_bpe(iter(texts), 300)
    assert first.to_str() == second.to_str()
    tokenizer = Tokenizer(first)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(texts[0])) < len(texts[0]) / 2


def test_vocab_size_is_the_highest_id_and_not_the_count(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.WordLevel({"<|endoftext|>": 0, "a": 70}, unk_token="a"))
    assert Tokenizer(backend).vocab_size == 71
    assert byte_tokenizer.vocab_size == 257


def test_too_small_a_vocabulary_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 256, must be at least 257"):
        train_byte_level_bpe(["x"], 256)


def test_check_vocabulary_names_both_sizes(byte_tokenizer: Tokenizer) -> None:
    check_vocabulary(byte_tokenizer, 257)
    with pytest.raises(
        ValueError, match=r"vocab_size is 256, .* ids up to 256: set model.vocab_size to at least 257"
    ):
        check_vocabulary(byte_tokenizer, 256)


def test_a_missing_path_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist: .*data\.sample"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_folder_without_tokenizer_json_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json \(it holds vocab\.txt\)"):
        Tokenizer.load(tmp_path)


def test_a_damaged_tokenizer_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.load(tmp_path)


def test_an_end_of_document_token_that_is_not_there_is_refused(tmp_path: Path) -> None:
    train_byte_level_bpe([], 257).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"'</s>' is not in the vocabulary of .*data\.end_of_document"):
        Tokenizer.load(tmp_path, end_of_document="</s>")


def test_the_fingerprint_tells_vocabularies_apart(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == byte_tokenizer.fingerprint
    other = Tokenizer(train_byte_level_bpe(["abab abab"], 258))
    assert other.fingerprint != byte_tokenizer.fingerprint
    assert Tokenizer.load(tmp_path, end_of_document="a").fingerprint != byte_tokenizer.fingerprint


TEXTS_OF_MANY_PIECES = {
    "lines": "Some line of a text, 1234 long.\n\n\tThe next, \u00e9t\u00e9!\n" * 100,
    "words": "words without a line end, and numbers 12 345, " * 100,
    "one word": "x" * 5000,
    "spaces": " " * 3000 + "a" + "\t \n" * 900 + "b",
    "no ascii": "\u4e2d\u6587\U0001f600" * 900,
}


@pytest.mark.parametrize("name", TEXTS_OF_MANY_PIECES)
def test_a_long_text_is_encoded_in_pieces_and_decodes_to_itself(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text = TEXTS_OF_MANY_PIECES[name]
    whole = byte_tokenizer.encode(text)
    monkeypatch.setattr("data.tokenizer._PIECE_CHARACTERS", 100)
    monkeypatch.setattr("data.tokenizer._BATCH_CHARACTERS", 700)
    assert byte_tokenizer.decode(byte_tokenizer.encode(text)) == text
    assert byte_tokenizer.encode(text) == whole
    assert byte_tokenizer.encode_batch(["a", text, "b"])[1] == whole


@needs_qwen3
@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab\u00e9\u03c9 \n\t\r1'.,<|>\u4e2d\U0001f600"), max_size=400))
def test_pieces_that_end_with_a_line_or_a_word_leave_the_tokens_as_they_are(text: str) -> None:
    tokenizer = _qwen3()
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tokenizer._PIECE_CHARACTERS", 40)
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(whole)
        pieces = _pieces(text)
        assert "".join(pieces) == text
        is_clean = all(
            (before[-1] == "\n" and not after[0].isspace()) or (after[0] == " " and not before[-1].isspace())
            for before, after in pairwise(pieces)
        )
        if is_clean:
            assert tokenizer.encode(text) == whole


@functools.cache
def _qwen3() -> Tokenizer:
    return Tokenizer.load(QWEN3)


@needs_qwen3
def test_ten_megabytes_of_spaces_are_no_reason_to_panic() -> None:
    # The library's own regular expression gives up on them: "retry-limit-in-match over".
    text = " " * 10_000_000 + "end"
    assert _qwen3().decode(_qwen3().encode(text)) == text


def test_another_process_gets_the_same_tokenizer(byte_tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(byte_tokenizer))
    assert again.fingerprint == byte_tokenizer.fingerprint
    forged = "before<|endoftext|>after"
    assert again.encode(forged) == byte_tokenizer.encode(forged)
    assert again.end_of_document_id == byte_tokenizer.end_of_document_id


@needs_qwen3
def test_qwen3_has_the_published_ids() -> None:
    tokenizer = _qwen3()
    assert tokenizer.vocab_size == 151_669
    assert tokenizer.end_of_document_id == 151_643
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    check_vocabulary(tokenizer, 151_936)
    with pytest.raises(ValueError, match="151669"):
        check_vocabulary(tokenizer, 151_668)


def test_the_train_command_learns_from_parquet_and_what_it_writes_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["some words of text, words again", None, "", "more words"]
    pq.write_table(pa.table({"content": rows}), tmp_path / "a.parquet")
    words = ["train", "--files", str(tmp_path / "*.parquet"), "--out", str(tmp_path / "out"), "--vocab-size"]
    tokenizer_main([*words, "262"])
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.vocab_size == 262
    assert tokenizer.decode(tokenizer.encode("some words, unseen ones too")) == "some words, unseen ones too"
    assert len(tokenizer.encode("words")) < 5
    with pytest.raises(SystemExit):
        tokenizer_main([*words, "100"])
    assert "vocab_size is 100, must be at least 257" in capsys.readouterr().err


def test_the_train_command_learns_from_the_part_of_a_huge_document_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = "\u00e9t\u00e9 " * 1000
    for name, rows in (("first", [huge]), ("later", ["ab ab", huge])):
        pq.write_table(pa.table({"content": rows}), tmp_path / f"{name}.parquet")
        words = ["train", "--files", str(tmp_path / f"{name}.parquet"), "--out", str(tmp_path / name)]
        tokenizer_main([*words, "--vocab-size", "262", "--max-bytes", "1000"])
        assert Tokenizer.load(tmp_path / name).vocab_size == 262
    assert list(_first_bytes(open_text(ParquetSource(files=[str(tmp_path / "later.parquet")])), 7)) == [
        "ab ab",
        "\u00e9",
    ]
    with pytest.raises(SystemExit):
        tokenizer_main([*words, "--vocab-size", "262", "--max-bytes", "0"])
    assert "--max-bytes is 0, must be at least 1" in capsys.readouterr().err


def test_the_train_command_reads_json_lines_and_text_files_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words of text"}\n')
    (tmp_path / "a.txt").write_text("some words of text")
    for words in (["--files", str(tmp_path / "a.jsonl")], ["--folder", str(tmp_path)]):
        out = tmp_path / words[0].strip("-")
        tokenizer_main(["train", *words, "--out", str(out), "--vocab-size", "260"])
        assert Tokenizer.load(out).vocab_size == 260
