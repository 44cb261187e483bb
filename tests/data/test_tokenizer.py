import functools
import hashlib
import json
import pickle
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.tokenizer import Tokenizer, _split, check_vocabulary
from data.tokenizer_content import describe_other_tokenizer, is_older_fingerprint, same_tokenizer
from data.train_tokenizer import train_byte_level_bpe
from errors import UserError
from tests.conftest import make_text

# Qwen3's own normalizer and pre-tokenizer
QWEN3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def qwen3_like() -> Tokenizer:
    """A small vocabulary behind Qwen3's normalizer and pre-tokenizer."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [make_text(seed, 100) for seed in range(10)]
    spaces = ["a\n\n\tb \r\n  'll 'll 1,1 .. <||> \u00e9\u00e9 \u03c9\u03c9 \u4e2d\u4e2d  \n \n"] * 50
    backend.train_from_iterator(texts + spaces, trainer)
    return Tokenizer(backend)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_decodes_to_itself(byte_tokenizer: Tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text)
    assert byte_tokenizer.decode(ids) == text
    assert byte_tokenizer.encode_batch([text, "x", text]) == [ids, byte_tokenizer.encode("x"), ids]


def test_a_special_token_spelled_out_in_a_text_is_encoded_as_text(byte_tokenizer: Tokenizer) -> None:
    forged = "before<|endoftext|>after"
    assert byte_tokenizer.end_of_document_id not in byte_tokenizer.encode(forged)
    assert byte_tokenizer.end_of_document_id not in byte_tokenizer.encode_batch([forged])[0]
    assert byte_tokenizer.decode(byte_tokenizer.encode(forged)) == forged


def test_truncation_padding_and_template_of_the_file_are_turned_off(tmp_path: Path) -> None:
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


def test_vocab_size_is_the_highest_id_plus_one_and_not_the_count(byte_tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 70}, unk_token="a"))
    assert Tokenizer(backend).vocab_size == 71
    assert byte_tokenizer.vocab_size == 257


def test_check_vocabulary_names_both_sizes(byte_tokenizer: Tokenizer) -> None:
    check_vocabulary(byte_tokenizer, 257)
    with pytest.raises(
        ValueError, match=r"vocab_size is 256, .* ids up to 256: set model.vocab_size to at least 257"
    ):
        check_vocabulary(byte_tokenizer, 256)


def test_a_missing_path_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist: .*data\.train_tokenizer.*data\.sample"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_folder_without_tokenizer_json_is_rejected_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json \(it holds vocab\.txt\)"):
        Tokenizer.load(tmp_path)


def test_a_damaged_tokenizer_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"cannot load .*tokenizer\.json as a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_missing_end_of_document_token_is_rejected(tmp_path: Path) -> None:
    train_byte_level_bpe([], 257).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"'</s>' is not in the vocabulary of .*data\.end_of_document"):
        Tokenizer.load(tmp_path, end_of_document="</s>")


def test_the_fingerprint_distinguishes_vocabularies(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == byte_tokenizer.fingerprint
    other = Tokenizer(train_byte_level_bpe(["abab abab"], 258))
    assert other.fingerprint != byte_tokenizer.fingerprint
    assert Tokenizer.load(tmp_path, end_of_document="a").fingerprint != byte_tokenizer.fingerprint


Table = dict[str, Any]


def _lowercase(table: Table) -> None:
    table["normalizer"] = {"type": "Lowercase"}


def _split_digits(table: Table) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, table["pre_tokenizer"]]}


def _swap_merges(table: Table) -> None:
    merges = table["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _make_token_not_special(table: Table) -> None:
    table["added_tokens"][0]["special"] = False


def _add_template(table: Table) -> None:
    end = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    pieces = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": {"<|endoftext|>": end},
    }


@pytest.mark.parametrize(
    "change", [_lowercase, _split_digits, _swap_merges, _make_token_not_special, _add_template]
)
def test_the_fingerprint_covers_all_that_changes_ids(tmp_path: Path, change: Callable[[Table], None]) -> None:
    tokenizer = Tokenizer(train_byte_level_bpe(["abab cdcd"] * 9, 262))
    tokenizer.save(tmp_path / "tokenizer.json")
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    change(table)
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    changed = Tokenizer.load(tmp_path).fingerprint
    assert changed != tokenizer.fingerprint
    assert not same_tokenizer(changed, tokenizer.fingerprint)
    assert "the vocabulary is the same" in describe_other_tokenizer(changed, tokenizer.fingerprint)


def test_a_fingerprint_of_an_earlier_version_is_recognized_by_the_vocabulary(
    byte_tokenizer: Tokenizer,
) -> None:
    # as released before: the sorted vocabulary with the end-of-document token
    vocabulary = sorted(byte_tokenizer._backend.get_vocab().items(), key=lambda item: item[1])
    old = hashlib.sha256(json.dumps(["<|endoftext|>", vocabulary]).encode()).hexdigest()[:16]
    assert is_older_fingerprint(old)
    assert not is_older_fingerprint(byte_tokenizer.fingerprint)
    assert same_tokenizer(old, byte_tokenizer.fingerprint)
    assert same_tokenizer(byte_tokenizer.fingerprint, old)
    other = Tokenizer(train_byte_level_bpe(["abab abab"], 258)).fingerprint
    assert not same_tokenizer(old, other)
    assert "the vocabulary or the end-of-document token is another" in describe_other_tokenizer(old, other)


ADDED = ["<|endoftext|>", "<think>", "</think>", "<|fim_prefix|>", " the ", "\u4e2d", "ab"]
PIECES = st.sampled_from([*ADDED, "one", " two", "a", "b", "<", "\n", "\u00e9", "<|", "think>", "the", "zz"])


def _with_added_tokens(seed: int) -> Tokenizer:
    """A tokenizer with added tokens of every kind: special or not, normalized or not, stripping spaces."""
    draw = random.Random(seed)
    backend = train_byte_level_bpe([make_text(seed, 100), "abab thinkthink"], 300)
    for content in ADDED[1:]:
        options = {
            name: draw.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
        }
        backend.add_tokens([tokenizers.AddedToken(content, **options)])
    return Tokenizer(backend)


@pytest.mark.parametrize("seed", range(4))
@settings(deadline=None, max_examples=40)
@given(text=st.lists(PIECES, max_size=12).map("".join))
def test_no_document_gives_the_id_of_an_added_token_and_other_text_keeps_its_ids(
    seed: int, text: str
) -> None:
    tokenizer = _tokenizers(seed)
    ids = tokenizer.encode(text)
    assert not {*ids} & {*tokenizer._backend.get_added_tokens_decoder()}
    assert tokenizer.decode(ids) == text
    if not any(token.strip() in text for token in ADDED):
        assert tokenizer.encode_prompts([text])[0] == ids
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == ids


_tokenizers = functools.cache(_with_added_tokens)


def test_an_end_of_document_token_that_is_not_special_cannot_be_forged(tmp_path: Path) -> None:
    Tokenizer(train_byte_level_bpe([], 257)).save(tmp_path / "tokenizer.json")
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    _make_token_not_special(table)
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = Tokenizer.load(tmp_path)
    forged = "one <|endoftext|> two"
    assert tokenizer.end_of_document_id not in tokenizer.encode(forged)
    assert tokenizer.decode(tokenizer.encode(forged)) == forged


def test_prompts_have_the_ids_of_transformers(tmp_path: Path) -> None:
    tokenizer = _with_added_tokens(0)
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("plain", "one <|endoftext|> two <think> x </think>", "a the b \u4e2d ab"):
        expected = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode_prompts([text]) == [expected]
    assert tokenizer.end_of_document_id in tokenizer.encode_prompts(["one <|endoftext|> two"])[0]


MODELS: dict[str, Callable[[dict[str, int]], Any]] = {
    "word level": lambda vocabulary: tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"),
    "word piece": lambda vocabulary: tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"),
    "unigram": lambda vocabulary: tokenizers.models.Unigram([(word, -1.0) for word in vocabulary], 0),
    "bpe that looks words up": lambda vocabulary: tokenizers.models.BPE(
        vocabulary, [("E", "N"), ("EN", "D")], unk_token="[UNK]", ignore_merges=True
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_added", [True, False])
def test_the_end_in_the_vocabulary_of_any_model_is_not_reached_by_text(name: str, is_added: bool) -> None:
    words = ["[UNK]", "END", "a", "##a", "E", "N", "D", "EN"]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(MODELS[name](vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if is_added:
        backend.add_special_tokens(["END"])
    tokenizer = Tokenizer(backend, end_of_document="END")
    assert tokenizer.end_of_document_id == 1
    ids = tokenizer.encode("a END aEND END")
    assert 1 not in ids
    assert vocabulary["a"] in ids
    assert 1 in tokenizer.encode_prompts(["a END"])[0]


def test_an_end_that_ordinary_text_needs_is_refused(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"no other token for the character 'a'.*data\.end_of_document"):
        Tokenizer.load(tmp_path, end_of_document="a").encode("ab")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match=r"'\[UNK\]' is also the unk_token"):
        Tokenizer(backend, end_of_document="[UNK]").encode("a")


# a newline, a space, the first byte of many Chinese characters
BYTES = {"\u010a": 0x0A, "\u0120": 0x20, "\u00e9": 0xE9}


@pytest.mark.parametrize("spelled", BYTES)
def test_a_token_that_spells_a_byte_of_ordinary_text_cannot_be_the_end_or_added(
    spelled: str, byte_tokenizer: Tokenizer, qwen3_like: Tokenizer, tmp_path: Path
) -> None:
    message = rf"no other token for the byte 0x{BYTES[spelled]:02X} than {spelled!r}"
    for each in (byte_tokenizer, qwen3_like):
        each.save(tmp_path / "tokenizer.json")
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path, end_of_document=spelled).encode("x")
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.add_tokens([spelled])
        with pytest.raises(ValueError, match=message):
            Tokenizer(backend).encode("x")


def test_a_token_that_spells_a_byte_of_no_text_may_be_the_end(
    byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    text = "three\n\nfour \u00ff \u4e2d"
    tokenizer = Tokenizer.load(tmp_path, end_of_document="\u00ff")  # the byte 0xFF
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_byte_that_only_the_fallback_of_the_end_spells_is_refused() -> None:
    vocabulary = {"[UNK]": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="[UNK]", byte_fallback=True)
    with pytest.raises(ValueError, match=r"the byte 0x0A than '<0x0A>'"):
        Tokenizer(tokenizers.Tokenizer(model), end_of_document="<0x0A>").encode("x")


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


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab\u00e9\u03c9 \n\t\r1'.,<|>\u4e2d\U0001f600"), max_size=400))
def test_splits_at_a_line_or_a_word_do_not_change_the_tokens(qwen3_like: Tokenizer, text: str) -> None:
    whole = qwen3_like.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tokenizer._PIECE_CHARACTERS", 40)
        assert qwen3_like.decode(qwen3_like.encode(text)) == qwen3_like.decode(whole)
        pieces = _split(text)
        assert "".join(pieces) == text
        has_clean_splits = all(
            (left[-1] == "\n" and not right[0].isspace()) or (right[0] == " " and not left[-1].isspace())
            for left, right in pairwise(pieces)
        )
        if has_clean_splits:
            assert qwen3_like.encode(text) == whole


def test_ten_megabytes_of_spaces_are_encoded(qwen3_like: Tokenizer) -> None:
    # the library's own regular expression fails on them: "retry-limit-in-match over"
    text = " " * 10_000_000 + "end"
    assert qwen3_like.decode(qwen3_like.encode(text)) == text


def test_a_pickled_tokenizer_encodes_alike(byte_tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(byte_tokenizer))
    assert again.fingerprint == byte_tokenizer.fingerprint
    forged = "before<|endoftext|>after"
    assert again.encode(forged) == byte_tokenizer.encode(forged)
    assert again.end_of_document_id == byte_tokenizer.end_of_document_id


@pytest.mark.network
def test_qwen3_has_the_published_ids() -> None:
    tokenizer = Tokenizer.load("Qwen/Qwen3-0.6B-Base")
    assert tokenizer.vocab_size == 151_669
    assert tokenizer.end_of_document_id == 151_643
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    check_vocabulary(tokenizer, 151_936)
    with pytest.raises(ValueError, match="151669"):
        check_vocabulary(tokenizer, 151_668)


def test_a_tokenizer_that_does_not_exist_is_not_blamed_on_a_key_that_was_not_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^the tokenizer '{tmp_path}/none' does not exist: give a folder"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(UserError, match=rf"^the tokenizer '{tmp_path}' has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
