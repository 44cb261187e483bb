"""Continuations are decoded behind their prompt by every kind of decoder; text must be UTF-8."""

import io
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from errors import run_command
from models.config import ModelConfig
from models.generation import __main__ as command_line
from models.generation.text_stream import TextStream, decode_behind, stop_at
from tests.models.test_checkpoint import save_run

SPACE = "\u2581"


def sentencepiece() -> Tokenizer:
    """Words that begin with a space, byte fallback, and a decoder that strips the first space."""
    names = ["<|endoftext|>", SPACE, *(SPACE + word for word in ("return", "cur", "a", "b")), "cur", "c", "."]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_level() -> Tokenizer:
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_piece() -> Tokenizer:
    names = ["<|endoftext|>", "walk", "##ing", "##s", "dog", ".", "a"]
    tokenizer = Tokenizer(models.WordPiece(vocab={name: i for i, name in enumerate(names)}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def plain(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def drawn_ids(tokenizer: Tokenizer, seed: int) -> list[int]:
    """Draw tokens, some of them the bytes of whole characters."""
    random_ = random.Random(seed)
    vocabulary = tokenizer.get_vocab()
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    ids: list[int] = []
    for _ in range(random_.randrange(2, 30)):
        name = names[random_.randrange(1, len(names))]
        if name.startswith("<0x"):
            ids += [vocabulary[f"<0x{byte:02X}>"] for byte in random_.choice("\u00e9\u5317").encode()]
        elif name in pre_tokenizers.ByteLevel.alphabet():
            ids += tokenizer.encode(random_.choice("a \u00e9\u5317\n")).ids
        else:
            ids.append(vocabulary[name])
    return ids


@pytest.mark.parametrize("make", [sentencepiece, metaspace, byte_level, word_piece])
@pytest.mark.parametrize("seed", range(25))
def test_a_prompt_and_its_streamed_continuation_are_the_text_of_both(
    make: Callable[[], Tokenizer], seed: int
) -> None:
    tokenizer = make()
    decode = plain(tokenizer)
    ids = drawn_ids(tokenizer, seed)
    at = random.Random(seed).randrange(1, len(ids))
    while "\ufffd" in decode(ids[:at]):
        at += 1
    prompt, tokens = ids[:at], ids[at:]
    whole = decode(ids)
    assert decode(prompt) + decode_behind(decode, prompt, tokens) == whole
    stream = TextStream(decode, [], prompt)
    pieces = [stream.add(token) for token in tokens]
    assert decode(prompt) + "".join(pieces) + stream.end() == whole
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_space_at_the_join_is_kept_and_one_at_the_start_of_a_text_is_not() -> None:
    tokenizer = sentencepiece()
    decode = plain(tokenizer)
    first, second = (tokenizer.get_vocab()[SPACE + word] for word in ("return", "cur"))
    assert decode([first]) + decode_behind(decode, [first], [second]) == "return cur"
    assert decode_behind(decode, [], [second]) == "cur"
    for prompt, expected in (([first], " cur"), ([], "cur")):
        stream = TextStream(decode, [], prompt)
        assert stream.add(second) + stream.end() == expected


def test_a_stop_string_that_begins_with_the_space_at_the_join_is_found() -> None:
    tokenizer = sentencepiece()
    decode = plain(tokenizer)
    first, second = (tokenizer.get_vocab()[SPACE + word] for word in ("return", "cur"))
    assert stop_at(decode, [" cur"], [[first]])(0, [second])
    assert not stop_at(decode, [" cur"], [[]])(0, [second])
    assert stop_at(decode, [" cur"], [[first]])(0, 30 * [first] + [second])
    stream = TextStream(decode, [" cur"], [first])
    assert stream.add(second) + stream.end() == ""


def test_the_work_per_token_does_not_grow_with_the_text() -> None:
    tokenizer = byte_level()
    sizes: list[int] = []

    def counted(ids: list[int]) -> str:
        sizes.append(len(ids))
        return plain(tokenizer)(ids)

    stream = TextStream(counted, ["never"], tokenizer.encode("the prompt").ids)
    for token in tokenizer.encode("caf\u00e9 \u5317\u4eac " * 30).ids:
        stream.add(token)
    assert max(sizes) < 24


def test_text_that_is_not_utf_8_is_refused_with_its_line_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path, ModelConfig(size="debug", vocab_size=257))
    byte_level().save(str(tmp_path / "tokenizer.json"))
    command = ["generation", "--checkpoint", str(tmp_path), "--device", "cpu", "--max-new-tokens", "3"]
    command += ["--tokenizer", str(tmp_path / "tokenizer.json")]

    def run(stdin: bytes, *words: bytes) -> int:
        # as Python decodes the words of a command line
        monkeypatch.setattr(sys, "argv", [*command, *map(os.fsdecode, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        return run_command(command_line.main)

    for words, stdin, message in (
        ((), b"a\nline two\ncaf\xe9 au lait", "stdin is not UTF-8: byte 4 of line 3 is 0xe9"),
        ((b"--prompt", b"caf\xe9"), b"", "--prompt is not UTF-8: byte 4 of line 1 is 0xe9"),
        ((b"--prompt", b"a", b"--stop", b"\xff"), b"", "--stop is not UTF-8: byte 1 of line 1 is 0xff"),
    ):
        assert run(stdin, *words) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
    assert run("caf\u00e9\n".encode()) == 0
    assert capsys.readouterr().out.startswith("caf\u00e9")


def test_a_tokenizer_that_is_damaged_or_fails_on_the_prompt_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path, ModelConfig(size="debug", vocab_size=257))
    file = tmp_path / "tokenizer.json"
    slow = byte_level()
    slow.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a|a)+b"), "isolated")
    slow.save(str(file))
    words = ["--checkpoint", str(tmp_path), "--device", "cpu", "--tokenizer", str(file), "--prompt", "a" * 60]
    monkeypatch.setattr(sys, "argv", ["generation", *words])
    for message in (
        "cannot encode the prompt (Onig: Regex search error",
        f"cannot load {file} as a tokenizer",
    ):
        assert run_command(command_line.main) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        file.write_text("{")
