import json
import math
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data import sample
from data.sources.split import is_held_out
from data.tokenizer import Tokenizer

MAX_BYTES = 1_500_000
HELD_OUT_OF_200 = [10, 57, 87, 110, 116, 141, 173, 199]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    sample.make(folder, vocab_size=400, max_bytes=MAX_BYTES)
    return folder


def _texts(path: Path) -> list[str]:
    return pq.read_table(path)["content"].to_pylist()


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_files_have_ultra_finewebs_schema(made: Path) -> None:
    for name in (sample.TRAIN_FILE, sample.VALIDATION_FILE):
        schema = pq.read_schema(made / name)
        assert [(field.name, str(field.type)) for field in schema] == [
            ("content", "string"),
            ("score", "float"),
            ("source", "string"),
        ]


def test_train_and_validation_are_disjoint(made: Path) -> None:
    train, validation = _texts(made / sample.TRAIN_FILE), _texts(made / sample.VALIDATION_FILE)
    assert not set(train) & set(validation)
    assert not any(is_held_out(text) for text in train)
    assert all(is_held_out(text) for text in validation)
    assert len(set(train)) == len(train) > 30
    # the order in which text is truncated does not depend on the split
    assert 0 < len(validation) < len(train) / 8
    assert sum(len(text.encode()) for text in train + validation) <= MAX_BYTES


def test_the_split_depends_on_the_content_alone_and_holds_out_3_percent() -> None:
    # fixed: a change would put held-out text of earlier runs into training
    assert [index for index in range(200) if is_held_out(f"document {index}")] == HELD_OUT_OF_200
    fraction = sum(is_held_out(f"text {index}") for index in range(20_000)) / 20_000
    assert abs(fraction - 8 / 256) < 0.005


def test_the_summary_counts_the_content_of_the_files(made: Path) -> None:
    summary = json.loads((made / sample.SUMMARY_FILE).read_text())
    tokenizer = Tokenizer.load(made)
    assert summary["tokenizer_vocab_size"] == tokenizer.vocab_size == 400
    totals: Counter[str] = Counter()
    for name, file in (("train", sample.TRAIN_FILE), ("validation", sample.VALIDATION_FILE)):
        texts = _texts(made / file)
        documents = [[*tokenizer.encode(text), tokenizer.end_of_document_id] for text in texts]
        sizes = {
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": sum(map(len, documents)),
        }
        assert summary[name] == sizes
        totals.update(sizes)
    assert {key: summary[key] for key in totals} == totals
    # as the held-out loss of a run, over the tokens that are predicted
    ids = [token for document in documents for token in document[1:]]
    counts = Counter(ids)
    entropy = -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values())
    assert math.isclose(summary["unigram_entropy_nats"], entropy, rel_tol=1e-12)
    assert 3.0 < entropy < math.log(400)


def test_unigram_entropy_of_known_distributions() -> None:
    assert math.isclose(sample.unigram_entropy(Counter({0: 5, 1: 5, 2: 5, 3: 5})), math.log(4))
    assert sample.unigram_entropy(Counter({7: 9})) == 0
    assert math.isclose(
        sample.unigram_entropy(Counter({0: 3, 1: 1})), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    )


def test_the_sample_is_bit_identical_when_made_again(made: Path, tmp_path: Path) -> None:
    sample.make(tmp_path / "again", vocab_size=400, max_bytes=MAX_BYTES)
    assert _bytes(tmp_path / "again") == _bytes(made)


def test_a_complete_sample_is_not_touched_and_a_damaged_one_is_made_again(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _bytes(made)
    collect = sample.collect
    calls: list[Path] = []

    def spy(library: Path) -> list[sample.Text]:
        calls.append(library)
        return collect(library)

    monkeypatch.setattr(sample, "collect", spy)
    sample.make(made, vocab_size=400, max_bytes=MAX_BYTES)
    assert not calls
    (made / sample.TRAIN_FILE).write_bytes(whole[sample.TRAIN_FILE][:1000])
    sample.make(made, vocab_size=400, max_bytes=MAX_BYTES)
    assert len(calls) == 1
    assert _bytes(made) == whole
    (made / sample.TOKENIZER_FILE).unlink()
    sample.make(made, vocab_size=400, max_bytes=MAX_BYTES)
    assert len(calls) == 2
    assert _bytes(made) == whole
    sample.make(made, vocab_size=400, max_bytes=MAX_BYTES, force=True)
    assert len(calls) == 3
    for damaged in ("[]", "3", '{"settings"', '{"settings": {}, "sha256": []}'):
        (made / sample.SUMMARY_FILE).write_text(damaged)
        sample.make(made, vocab_size=400, max_bytes=MAX_BYTES)
        assert _bytes(made) == whole


def test_a_vocabulary_out_of_range_is_refused_before_a_sample_is_touched(made: Path) -> None:
    whole = _bytes(made)
    for vocab_size in (10, 10**12):
        with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}, must be at least 257"):
            sample.make(made, vocab_size=vocab_size, max_bytes=MAX_BYTES, force=True)
    assert _bytes(made) == whole


def test_an_interrupt_leaves_no_partial_file_and_an_incomplete_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(texts: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample, "_write_parquet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample.make(tmp_path, vocab_size=300, max_bytes=MAX_BYTES)
    assert os.listdir(tmp_path) == []
    sample.make(tmp_path, vocab_size=300, max_bytes=MAX_BYTES)
    assert (tmp_path / sample.SUMMARY_FILE).is_file()


def test_collect_leaves_out_tests_generated_huge_and_undecodable_files(tmp_path: Path) -> None:
    body = "def function(argument):\n    return argument\n" * 10
    (tmp_path / "test").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "good.py").write_text(body + "good = 1\n")
    (tmp_path / "package" / "also.py").write_text(body + "also = 1\n")
    (tmp_path / "copy.py").write_text(body + "good = 1\n")
    (tmp_path / "test" / "test_x.py").write_text(body + "test = 1\n")
    (tmp_path / "made.py").write_text("# Auto-generated by a tool\n" + body)
    (tmp_path / "huge.py").write_text(body * 1000)
    (tmp_path / "latin.py").write_bytes(body.encode() + b"# \xe9\n")
    (tmp_path / "tiny.py").write_text("x = 1\n")
    sources = [text.source for text in sample.collect(tmp_path) if text.source.startswith("python-source/")]
    assert sorted(sources) == ["python-source/copy.py", "python-source/package/also.py"]


def test_a_library_without_sources_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no Python source"):
        sample.collect(tmp_path)


def test_too_small_a_limit_is_rejected_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_bytes is 1000, which leaves .* training documents"):
        sample.make(tmp_path, max_bytes=1000)


def test_the_command_prints_counts_and_entropy(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main(["--out", str(made), "--vocab-size", "400", "--max-bytes", str(MAX_BYTES)])
    summary = json.loads((made / sample.SUMMARY_FILE).read_text())
    printed = capsys.readouterr().out
    assert f"{summary['unigram_entropy_nats']:.4f} nats/token" in printed
    assert f"{summary['train']['tokens']:,} tokens" in printed
