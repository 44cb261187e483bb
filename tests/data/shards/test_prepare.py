"""Preparing shards: what is written, resuming after any interrupt, and finding damage."""

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import ShardsSource, TextOptions
from data.shards import __main__ as shards
from data.shards.prepare import PrepareOptions, Progress, prepare
from data.shards.verify import length_histogram
from data.sources.files import FileDocuments
from data.sources.shard_format import INDEX, read_manifest, read_shard, shard_folder
from data.sources.shards import ShardDocuments
from data.sources.split import is_held_out
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_byte_level_bpe
from errors import UserError, run_command
from tests.data.shards.folders import bytes_of, problems_of

FILES: list[list[object]] = [
    [f"document {index} " + "x" * (index * 7 % 23) for index in range(150)],
    [None, "", *(f"other {index}" for index in range(80)), "\ud800"],
]
TEXTS = [text for text in itertools.chain(*FILES) if isinstance(text, str) and text.isascii() and text]


def _prepare(folder: Path, source: FileDocuments, tokenizer: Tokenizer, **options: Any) -> None:
    arguments: dict[str, Any] = {"shard_tokens": 700, **options}
    prepare(folder, source, tokenizer, PrepareOptions(**arguments))


def _texts(folder: Path, tokenizer: Tokenizer, split: str) -> list[str]:
    source = ShardDocuments(
        ShardsSource(folder=str(folder)),
        tokenizer_fingerprint=tokenizer.fingerprint,
        split=split,  # pyrefly: ignore [bad-argument-type]
    )
    texts = []
    for row in source.read(repeat=False):
        assert row.tokens is not None
        ids = row.tokens[:].tolist()
        assert len(row.tokens) == len(ids)
        assert ids[-1] == tokenizer.end_of_document_id
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


def test_shards_hold_every_document_once_in_order_and_split(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    held_out = [text for text in TEXTS if is_held_out(text)]
    assert held_out
    assert _texts(tmp_path, byte_tokenizer, "held_out") == held_out
    assert _texts(tmp_path, byte_tokenizer, "train") == [text for text in TEXTS if not is_held_out(text)]
    assert sorted(_texts(tmp_path, byte_tokenizer, "all")) == sorted(TEXTS)
    manifest = read_manifest(tmp_path)
    assert manifest.skipped == {"empty": 1, "not_text": 1, "null": 1}
    assert sum(split.documents for split in manifest.splits.values()) == len(TEXTS)
    assert sum(split.tokens for split in manifest.splits.values()) == sum(len(text) + 1 for text in TEXTS)
    assert manifest.settings["tokenizer"]["fingerprint"] == byte_tokenizer.fingerprint
    summaries = [read_shard(tmp_path, number) for number in range(len(manifest.shards))]
    assert len(summaries) > 5
    assert all(700 <= each.num_tokens < 740 for each in summaries[:-1])
    assert [each.is_last for each in summaries] == [False] * (len(summaries) - 1) + [True]
    assert problems_of(tmp_path) == []


def test_ids_beyond_16_bits_are_kept(tmp_path: Path, list_source: Any) -> None:
    words = {"<|endoftext|>": 151_643, "small": 0, "large": 151_668}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="small"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend)
    _prepare(tmp_path, list_source([["large small large"]]), tokenizer)
    tokens = [
        np.fromfile(shard_folder(tmp_path, 0) / f"{split}.tokens", "<u4") for split in ("train", "held_out")
    ]
    assert np.concatenate(tokens).tolist() == [151_668, 0, 151_668, 151_643]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    shard_tokens=st.integers(1, 200),
    interrupts=st.lists(st.integers(1, 45), max_size=4),
)
def test_a_preparation_that_is_interrupted_anywhere_writes_the_same_bytes(
    list_source: Any,
    byte_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    shard_tokens: int,
    interrupts: list[int],
) -> None:
    texts = [chr(97 + index % 26) * length for index, length in enumerate(lengths)]
    if not any(texts):
        return
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    source = list_source([texts[:7], texts[7:]])
    _prepare(whole, source, byte_tokenizer, shard_tokens=shard_tokens)
    for num_rows in interrupts:
        interrupted = list_source([texts[:7], texts[7:]])
        read = interrupted.read

        def interrupt(*args: Any, read: Any = read, num: int = num_rows, **kwargs: Any) -> Iterator[Any]:
            yield from itertools.islice(read(*args, **kwargs), num)
            raise KeyboardInterrupt

        interrupted.read = interrupt  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            _prepare(resumed, interrupted, byte_tokenizer, shard_tokens=shard_tokens)
    _prepare(resumed, source, byte_tokenizer, shard_tokens=shard_tokens)
    assert bytes_of(resumed) == bytes_of(whole)
    assert problems_of(resumed) == []


def test_a_deleted_shard_is_rewritten_and_the_others_are_not_touched(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    before = bytes_of(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").rglob("*.tokens")}
    for number in (0, 3, 5):
        for file in shard_folder(tmp_path, number).iterdir():
            file.unlink()
        shard_folder(tmp_path, number).rmdir()
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    assert bytes_of(tmp_path) == before
    kept = [path for path in times if path.parent.name in ("00001", "00002", "00004")]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)
    (tmp_path / "train.index").unlink()
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("name", ["train.tokens", "held_out.documents", "shard.json"])
def test_a_shard_with_a_missing_or_truncated_file_is_rewritten(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    before = bytes_of(tmp_path)
    path = shard_folder(tmp_path, 3) / name
    path.unlink()
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    assert bytes_of(tmp_path) == before
    if path.suffix != ".json":
        path.write_bytes(path.read_bytes()[:-4])
        _prepare(tmp_path, list_source(FILES), byte_tokenizer)
        assert bytes_of(tmp_path) == before


def test_a_complete_folder_is_not_touched_and_other_settings_are_rejected(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)

    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if p.name != "prepare.lock"}

    before = times()
    _prepare(tmp_path, list_source(FILES), byte_tokenizer, num_processes=0)
    assert times() == before
    lowercase = train_byte_level_bpe([], 257)
    lowercase.normalizer = tokenizers.normalizers.Lowercase()
    for source, tokenizer, options, named in (
        (list_source(FILES[:1]), byte_tokenizer, {}, "source was"),
        (list_source(FILES), Tokenizer(_backend("a"), name="other"), {}, "tokenizer was .* and other"),
        (list_source(FILES), Tokenizer(lowercase), {}, "tokenizer was"),
        (list_source(FILES), byte_tokenizer, {"shard_tokens": 800}, "shard_tokens was 700 and is 800"),
        (list_source(FILES), byte_tokenizer, {"max_tokens": 800}, "max_tokens was None and is 800"),
    ):
        with pytest.raises(ValueError, match=f"prepared with other settings .*{named}"):
            _prepare(tmp_path, source, tokenizer, **options)


def _backend(end_of_document: str) -> Any:
    return train_byte_level_bpe([], 258, ["<|endoftext|>", end_of_document])


def test_max_tokens_and_an_empty_source(list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    _prepare(tmp_path / "some", list_source(FILES), byte_tokenizer, max_tokens=1000)
    texts = _texts(tmp_path / "some", byte_tokenizer, "all")
    assert sorted(texts) == sorted(TEXTS[: len(texts)])
    assert 1000 <= sum(len(text) + 1 for text in texts) < 1040
    assert problems_of(tmp_path / "some") == []
    # the source ends exactly where a shard does
    _prepare(tmp_path / "even", list_source([["abc", "def"]]), byte_tokenizer, shard_tokens=4)
    assert len(_texts(tmp_path / "even", byte_tokenizer, "all")) == 2
    assert problems_of(tmp_path / "even") == []
    with pytest.raises(ValueError, match="a list holds no document"):
        _prepare(tmp_path / "none", list_source([[None, ""]]), byte_tokenizer)
    for options, message in (
        ({"shard_tokens": 0}, "shard_tokens is 0, must be at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0, must be at least 1"),
        ({"num_processes": -1}, "num_processes is -1, must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _prepare(tmp_path / "bad", list_source(FILES), byte_tokenizer, **options)


def test_two_preparations_of_a_folder_exclude_each_other(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def again(progress: Progress) -> None:
        with pytest.raises(ValueError, match="another process is preparing"):
            _prepare(tmp_path, list_source(FILES), byte_tokenizer)

    prepare(tmp_path, list_source(FILES), byte_tokenizer, PrepareOptions(shard_tokens=2000), report=again)


def test_progress_grows_to_1_and_counts_documents(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    prepare(
        tmp_path, list_source(FILES), byte_tokenizer, PrepareOptions(shard_tokens=500), report=seen.append
    )
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert seen[-1].fraction == 1.0
    assert seen[-1].documents == len(TEXTS)
    assert 0 < seen[0].fraction < 1


def test_a_damaged_file_of_the_source_raises_with_its_name_or_is_counted(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="part-0 is damaged at row 100"):
        _prepare(tmp_path, list_source(FILES, damaged_at=(0, 100)), byte_tokenizer)
    tolerant = list_source(FILES, damaged_at=(0, 100), options=TextOptions(on_damaged_file="skip"))
    # on_damaged_file may change between runs
    _prepare(tmp_path, tolerant, byte_tokenizer)
    assert read_manifest(tmp_path).skipped["damaged_file"] == 1
    assert len(_texts(tmp_path, byte_tokenizer, "all")) == len(TEXTS) - 50


DAMAGE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("shards/00001/train.tokens", lambda data: data[:400] + b"\1" + data[401:], "SHA-256"),
    ("shards/00001/train.tokens", lambda data: data[:-4], "SHA-256"),
    ("shards/00002/held_out.documents", lambda data: data + b"\0" * 8, "SHA-256"),
    ("shards/00003/shard.json", lambda data: data[:-20], "cannot read"),
    (
        "shards/00003/shard.json",
        lambda data: data.replace(b'"documents": ', b'"documents": 1', 1),
        "shard.json does not match",
    ),
    ("train.index", lambda data: data[:30] + b"\7" + data[31:], "SHA-256"),
    (
        "prepare.json",
        lambda data: data.replace(b'"vocab_size": 257', b'"vocab_size": 258'),
        "other settings: tokenizer.vocab_size was 258 and is 257",
    ),
    ("prepare.json", lambda data: data[:-20], "cannot read"),
    ("prepare.json", lambda data: data.replace(b"max_tokens", b"m0x_tokens"), "another name"),
    (
        "manifest.json",
        lambda data: data.replace(b'"not_text": 1', b'"not_text": 2'),
        "counts of skipped rows do not match",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE)
def test_verify_names_the_file_that_is_damaged_and_what_to_delete(
    list_source: Any,
    byte_tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[bytes], bytes],
    message: str,
) -> None:
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    path = tmp_path / name
    data = path.read_bytes()
    assert change(data) != data
    path.write_bytes(change(data))
    assert shards.main(["verify", str(tmp_path)]) == 1
    printed = "".join(capsys.readouterr())
    assert message in printed
    assert str(path if message == "SHA-256" or name == "prepare.json" else path.parent) in printed
    named = printed.split("delete these, and run the same `prepare` again\n", 1)[1].split()
    assert set(named) >= {str(path.parent if name.startswith("shards/") else path)}
    for each in map(Path, named):
        shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    assert problems_of(tmp_path) == []


def test_info_prints_counts_and_lengths(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(
        tmp_path,
        list_source(FILES),
        byte_tokenizer,
        PrepareOptions(),
        description={"kind": "hub", "repository": "some/set", "revision": "0123abc"},
    )
    assert shards.main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("some/set at revision 0123abc", "257 ids", "1 null", "train documents by length"):
        assert text in printed
    rows = length_histogram(tmp_path, "train")
    lengths = [len(text) + 1 for text in TEXTS if not is_held_out(text)]
    expected = {}
    for length in lengths:
        power = 1 << (length.bit_length() - 1)
        documents, tokens = expected.get(power, (0, 0))
        expected[power] = documents + 1, tokens + length
    assert {power: (documents, tokens) for power, documents, tokens in rows} == expected


def _exit_code(words: list[str]) -> int:
    return run_command(lambda: shards.main(words))


def test_the_command_line_ends_a_user_error_in_one_line(
    tmp_path: Path, byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n')
    start = ["prepare", "--tokenizer", str(tmp_path), "--out", str(tmp_path / "out"), "--processes", "0"]
    for words, message in (
        (["--files", str(tmp_path / "none.parquet")], "no file matches"),
        (["--files", "a.parquet", "b.jsonl"], "want all of them"),
        (["--files", "README.md"], "text files are read by --folder"),
        (["--folder", str(tmp_path / "none")], "not a folder"),
        (["--folder", str(tmp_path), "--min-score", "1"], "--min-score given with --folder"),
        (["--files", "a.jsonl", "--pattern", "*"], "--pattern given without"),
        (["--parts", "0-3"], "want numbers from 1 to 2048"),
        (["--files", str(tmp_path / "a.jsonl")], "holds no document"),
    ):
        assert _exit_code([*start, *words]) == 2
        assert message in capsys.readouterr().err
    assert _exit_code(["info", str(tmp_path)]) == 2
    assert "correct the folder, or make them with `python -m data.shards prepare" in capsys.readouterr().err
    words = ["--files", str(tmp_path / "a.jsonl"), "--text-column", "body", "--out", str(tmp_path / "good")]
    assert shards.main([*start, *words]) == 0


def test_a_lost_prepare_json_is_restored_for_the_same_settings_alone(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    before = bytes_of(tmp_path)
    (tmp_path / "prepare.json").unlink()
    with pytest.raises(ValueError, match="shard_tokens was 700 and is 800"):
        _prepare(tmp_path, list_source(FILES), byte_tokenizer, shard_tokens=800)
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    assert bytes_of(tmp_path) == before
    table = json.loads((tmp_path / "prepare.json").read_text())
    table["source"]["fingerprint"] = "0123456789abcdef"
    (tmp_path / "prepare.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="was prepared by an earlier version"):
        _prepare(tmp_path, list_source(FILES), byte_tokenizer)


@pytest.mark.parametrize("seed", range(8))
def test_a_wild_start_in_an_index_is_an_error_that_names_it(
    list_source: Any, byte_tokenizer: Tokenizer, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    _prepare(tmp_path, list_source(FILES), byte_tokenizer)
    path = tmp_path / "train.index"
    index = np.fromfile(path, dtype=INDEX)
    number = draw.randrange(len(index))
    index["start"][number] = draw.choice([0, 1 << 40, 1 << 63, (1 << 64) - 1, draw.randrange(1 << 64)])
    if number == 0:
        index["start"][0] = 1 << 40
    path.write_bytes(index.tobytes())
    settings: Any = {"tokenizer_fingerprint": byte_tokenizer.fingerprint, "split": "train"}
    source = ShardDocuments(ShardsSource(folder=str(tmp_path)), **settings)
    with pytest.raises(UserError, match=r"train\.index is damaged|is damaged in tokens"):
        _ = [row.tokens[:] for row in source.read(repeat=False) if row.tokens is not None]
    with pytest.raises(UserError, match=r"train\.index is damaged"):
        length_histogram(tmp_path, "train")
    tolerant = ShardDocuments(ShardsSource(folder=str(tmp_path), on_damaged_file="skip"), **settings)
    skipped = [row.skipped for row in tolerant.read(repeat=False)]
    assert 1 <= skipped.count("damaged_document") <= 2
    assert any("train.index" in problem for problem in problems_of(tmp_path))
