"""Datasets of the `datasets` library, from folders and a loopback hub: order, resume, filters, errors."""

import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from data.config import DataConfig, DatasetsSource, ParquetSource, ShardsSource
from data.fingerprint import check_fingerprint
from data.shards.prepare import PrepareOptions, prepare
from data.sources.files import FileDocuments
from data.sources.open import check_data, open_text
from data.sources.overlap import check_overlap
from data.sources.shard_format import read_manifest
from data.sources.split import is_held_out
from data.tokenizer import Tokenizer
from tests.data.sources.hub_server import COMMIT, DATASET, HubServer

ROOT = Path(__file__).parents[3]
REPOSITORY = "org/set"
OTHER_COMMIT = "f" * 40
# the first file has several row groups, the second one row
FILES = [[f"document {index} of the first" for index in range(41)], ["alone"]]
FILES += [[f"{index} of the last file" for index in range(20)]]
TEXTS = list(itertools.chain(*FILES))


def _parquet(texts: list[Any], **columns: Any) -> bytes:
    file = io.BytesIO()
    text = pa.array(texts, None if any(isinstance(each, bytes) for each in texts) else pa.string())
    pq.write_table(pa.table({"text": text, **columns}), file, row_group_size=8)
    return file.getvalue()


def _write_folder(folder: Path, files: list[list[Any]], suffix: str = "parquet") -> Path:
    folder.mkdir(parents=True)
    for index, texts in enumerate(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (folder / f"train-{index}.{suffix}").write_bytes(_parquet(texts) if suffix == "parquet" else lines)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of prepared datasets, and no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    datasets.disable_progress_bars()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sources.files.BLOCK_ROWS", 7)
    monkeypatch.setattr("data.sources.hf_datasets._BATCH_ROWS", 5)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with two commits of a small dataset, the first of which is the head of main."""
    server = HubServer()
    key = f"datasets/{REPOSITORY}"
    server.files[key] = {f"data/train-{index}.parquet": _parquet(file) for index, file in enumerate(FILES)}
    server.files[f"{key}@{OTHER_COMMIT}"] = {"data/train-0.parquet": _parquet(TEXTS[:50])}
    server.listable.add(key)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for where, name, value in (
        (constants, "ENDPOINT", server.endpoint),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
        (constants, "HF_HUB_CACHE", str(tmp_path / "cache")),
        (constants, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_ENDPOINT", server.endpoint),
        (datasets.config, "HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(where, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    yield server
    server.close()
    close_session()
    assert server.listed == []


Make = Callable[[str], dict[str, Any]]


@pytest.fixture
def source_of(tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    """Keys of a source of TEXTS, by name: from the hub, a folder or `save_to_disk`, streamed or not."""

    def make(name: str) -> dict[str, Any]:
        what, _, streamed = name.partition(" ")
        keys: dict[str, Any] = {"streaming": streamed == "streamed"}
        if what == "hub":
            request.getfixturevalue("hub")
            return {"path": REPOSITORY, **keys}
        if what in ("parquet", "jsonl"):
            return {"path": str(_write_folder(tmp_path / what, FILES, what)), **keys}
        whole = datasets.Dataset.from_dict({"text": TEXTS}, split=datasets.Split.TRAIN)
        if what == "saved":
            whole.save_to_disk(tmp_path / "saved", num_shards=3)
            return {"path": str(tmp_path / "saved")}
        # rows of another order on disk, which the library maps through an index
        order = list(reversed(range(len(TEXTS))))
        shuffled = datasets.Dataset.from_dict({"text": TEXTS[::-1]}).select(order)
        assert isinstance(shuffled, datasets.Dataset)
        datasets.DatasetDict({"train": shuffled, "test": whole}).save_to_disk(tmp_path / "splits")
        return {"path": str(tmp_path / "splits")}

    return make


NAMES = ["hub", "hub streamed", "parquet", "parquet streamed", "jsonl", "jsonl streamed", "saved", "splits"]


def _open(shuffle_seed: int | None = None, **keys: Any) -> FileDocuments:
    return open_text(DatasetsSource(**keys), shuffle_seed=shuffle_seed)


def _texts(source: FileDocuments) -> list[str | None]:
    return [row.text for row in source.read(repeat=False)]


@pytest.mark.parametrize("seed", [None, 3], ids=["in_order", "shuffled"])
@pytest.mark.parametrize("name", NAMES)
def test_reading_resumes_exactly_from_every_position(
    source_of: Make, name: str, seed: int | None, small_blocks: None
) -> None:
    keys = source_of(name)
    source = _open(seed, **keys)
    rows = list(itertools.islice(source.read(repeat=True), 2 * len(TEXTS) + 20))
    first, second = ([row.text for row in rows[at : at + len(TEXTS)]] for at in (0, len(TEXTS)))
    if seed is None:
        assert first == second == TEXTS
    else:
        assert sorted(map(str, first)) == sorted(map(str, second)) == sorted(TEXTS)
        assert len({tuple(first), tuple(second), tuple(TEXTS)}) == 3, "every epoch has an order of its own"
    again = _open(seed, **keys)
    assert again.fingerprint == source.fingerprint
    # each position of a hub's stream costs requests
    for index in range(0, len(rows) - 10, 9 if name == "hub streamed" else 1):
        position = json.loads(json.dumps(rows[index].next_position))
        assert list(itertools.islice(again.read(position, repeat=True), 10)) == rows[index + 1 : index + 11]


def test_two_readers_of_a_stream_do_not_disturb_each_other(source_of: Make) -> None:
    source = _open(**source_of("parquet streamed"))
    pairs = zip(source.read(repeat=False), source.read(repeat=False), strict=True)
    assert [first.text for first, second in pairs if first == second] == TEXTS


def test_a_prepared_dataset_is_shuffled_as_a_whole(tmp_path: Path) -> None:
    texts = [str(index) for index in range(20_000)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    order = [int(text or "") for text in _texts(_open(0, path=str(tmp_path / "saved")))]
    assert sorted(order) == list(range(20_000))
    for first in range(0, 20_000, 2000):
        spread = [sum(at // 2000 == part for at in order[first : first + 2000]) for part in range(10)]
        # 200 expected, with a standard deviation of 13
        assert all(abs(count - 200) < 80 for count in spread)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_filtered_as_those_of_other_sources(tmp_path: Path, streaming: bool) -> None:
    generator = random.Random(0)
    texts: list[Any] = [
        generator.choice(["", "  ", None, "ab", "long " * 9, f"text {i}"]) for i in range(200)
    ]
    scores = [generator.choice(["0.2", "0.9", None, "x"]) for _ in texts]
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "train.parquet"
    file.write_bytes(_parquet(texts, quality=pa.array(scores)))
    options: dict[str, Any] = {
        "min_characters": 3,
        "max_characters": 30,
        "min_score": 0.5,
        "score_column": "quality",
    }
    parquet = open_text(ParquetSource(files=[str(file)], text_column="text", **options), split="train")
    source = DatasetsSource(path=str(tmp_path / "folder"), streaming=streaming, **options)
    rows = list(open_text(source, split="train").read(repeat=False))
    assert [row[1:] for row in rows] == [row[1:] for row in parquet.read(repeat=False)]
    assert len({row.skipped for row in rows}) >= 7


def test_text_that_is_not_utf8_and_values_that_are_not_text_are_skipped(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff\xfe", b"also"]).cast(pa.binary()).view(pa.string())
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"text": column, "number": [1, 2, 3]}), tmp_path / "folder" / "train.parquet")
    source = _open(path=str(tmp_path / "folder"))
    assert [(row.text, row.skipped) for row in source.read(repeat=False)] == [
        ("good", None),
        (None, "not_text"),
        ("also", None),
    ]
    with pytest.raises(ValueError, match=r"holds no document .*3 not_text"):
        _texts(_open(path=str(tmp_path / "folder"), text_column="number"))


def test_rows_of_a_streamed_text_format_may_lack_the_column(tmp_path: Path) -> None:
    rows = [{"text": "first"}, {"other": 1}, {"text": None, "other": 2}, {"text": "last"}]
    (tmp_path / "folder").mkdir()
    for index, part in enumerate((rows[:2], rows[1:2], rows[2:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / "folder" / f"train-{index}.jsonl").write_text(lines)
    source = _open(path=str(tmp_path / "folder"), streaming=True, on_damaged_file="skip")
    skipped = [row.text or row.skipped for row in source.read(repeat=False)]
    assert skipped == ["first", "null", "null", "null", "last"]


def test_a_revision_is_part_of_the_fingerprint_and_the_head_of_main_is_not_assumed(hub: HubServer) -> None:
    head = _open(path=REPOSITORY)
    other = _open(path=REPOSITORY, revision=OTHER_COMMIT)
    assert _texts(head) == TEXTS
    assert _texts(other) == TEXTS[:50]
    assert _open(path=REPOSITORY, revision=COMMIT).fingerprint == head.fingerprint != other.fingerprint
    message = rf"org/set \(default, train\) at {COMMIT} left out; .* at {OTHER_COMMIT} added"
    with pytest.raises(ValueError, match=message):
        check_fingerprint("source", head.fingerprint, other.fingerprint, log=False)
    hub.heads[f"datasets/{REPOSITORY}"] = OTHER_COMMIT
    assert _open(path=REPOSITORY).fingerprint == other.fingerprint


def test_a_folder_may_move_and_other_files_are_another_dataset(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path / "here", FILES[:2])
    for streaming in (False, True):
        before = _open(path=str(folder), streaming=streaming).fingerprint
        moved = folder.rename(tmp_path / f"there{streaming}")
        assert _open(path=str(moved), streaming=streaming).fingerprint == before
        folder = moved
    before = [_open(path=str(folder), streaming=streaming).fingerprint for streaming in (False, True)]
    (folder / "train-1.parquet").write_bytes(_parquet(["other"]))
    for saved, streaming in zip(before, (False, True), strict=True):
        changed = _open(path=str(folder), streaming=streaming)
        with pytest.raises(ValueError, match=r"folder of data files \(default, train\).* changed"):
            check_fingerprint("source", saved, changed.fingerprint, log=False)
        assert _texts(changed) == [*FILES[0], "other"]


def test_ultra_fineweb_is_refused_before_any_request(hub: HubServer) -> None:
    for path in (DATASET, DATASET.lower() + "/"):
        with pytest.raises(ValueError, match=r'use parts of a source of kind "hub", such as "1-20"'):
            DatasetsSource(path=path)
    assert not hub.log


def test_what_does_not_exist_is_named_with_its_key_and_what_does(hub: HubServer, tmp_path: Path) -> None:
    card = "configs:\n- config_name: a\n  data_files: a/*\n- config_name: b\n  data_files: b/*\n"
    for config in ("a", "b"):
        _write_folder(tmp_path / "configs" / config, FILES[:1])
    (tmp_path / "configs" / "README.md").write_text(f"---\n{card}---\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(_parquet(TEXTS)[:300])
    datasets.Dataset.from_dict({"text": TEXTS}, split=datasets.Split.TEST).save_to_disk(tmp_path / "saved")
    wholes = datasets.DatasetDict({"a": datasets.Dataset.from_dict({"text": TEXTS})})
    wholes.save_to_disk(tmp_path / "wholes")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"path": REPOSITORY, "split": "test"}, r"split is 'test', but org/set has \['train'\]"),
        ({"path": REPOSITORY, "revision": "v2"}, "revision is 'v2': Revision 'v2' doesn't exist"),
        ({"path": REPOSITORY, "name": "c"}, r"name is 'c': BuilderConfig 'c' not found.*\['default'\]"),
        (
            {"path": REPOSITORY, "text_column": "content"},
            r"no column 'content' \(it has text\): set text_column",
        ),
        ({"path": REPOSITORY, "min_score": 0.5}, r"no column 'score' \(it has text\): set score_column"),
        ({"path": "org/other"}, "cannot open org/other .*doesn't exist.*check path"),
        ({"path": "parquet"}, "neither a folder nor the name of a dataset"),
        ({"path": "no/such/folder"}, "neither a folder nor the name of a dataset"),
        ({"path": str(tmp_path / "configs")}, r"name of .* is none: .*\['a', 'b'\]"),
        ({"path": str(tmp_path / "configs"), "name": "c"}, r"name is 'c'.*\['a', 'b'\]"),
        (
            {"path": str(tmp_path / "configs"), "name": "a", "revision": "main"},
            "revision is 'main', but path is",
        ),
        ({"path": str(tmp_path / "empty")}, "doesn't contain any data files"),
        ({"path": str(tmp_path / "damaged")}, "cannot open .*not a parquet file.*: correct its files"),
        ({"path": str(tmp_path / "saved")}, "split is 'train', but .*saved has 'test'"),
        ({"path": str(tmp_path / "saved"), "name": "a"}, "name is 'a', but .* was written by save_to_disk"),
        ({"path": str(tmp_path / "wholes")}, r"split is 'train', but .*wholes has \['a'\]"),
    ]
    for keys, message in cases:
        for streaming in (False, True):
            with pytest.raises(ValueError, match=message) as caught:
                _open(**keys, streaming=streaming)
            assert "\n" not in str(caught.value), keys
    for split in ("train[:10%]", "train+test", "all", ""):
        with pytest.raises(ValueError, match=r'want the name of one split, whole.*"held_out"'):
            DatasetsSource(path=REPOSITORY, split=split)
    assert _texts(_open(path=str(tmp_path / "configs"), name="b")) == FILES[0]
    assert _texts(_open(path=str(tmp_path / "saved"), split="test")) == TEXTS


@pytest.mark.parametrize("on_damaged_file", ["stop", "skip"])
def test_a_shard_that_is_damaged_while_streaming_stops_by_name_or_is_skipped(
    tmp_path: Path, on_damaged_file: str
) -> None:
    folder = _write_folder(tmp_path / "folder", [["good"], FILES[0], ["last"]])
    data = bytearray((folder / "train-1.parquet").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (folder / "train-1.parquet").write_bytes(data)
    source = _open(path=str(folder), streaming=True, on_damaged_file=on_damaged_file)
    if on_damaged_file == "stop":
        with pytest.raises(ValueError, match=r"cannot read shard 2 of 3 of .*folder \(train\).*is damaged"):
            _texts(source)
        return
    rows = list(source.read(repeat=False))
    assert [rows[0].text, rows[-1].text] == ["good", "last"]
    assert [row.skipped for row in rows].count("damaged_file") == 1


def test_a_stream_whose_network_fails_is_not_taken_for_damaged(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    rows = _open(path=REPOSITORY, streaming=True, on_damaged_file="skip").read(repeat=False)
    assert next(rows).text == TEXTS[0]
    hub.files[f"datasets/{REPOSITORY}"].clear()
    with pytest.raises(ValueError, match=r"cannot read shard \d of 3 of org/set .*gone or unreachable"):
        list(rows)


def test_validating_on_the_training_split_is_refused_unless_held_out(
    source_of: Make, byte_tokenizer: Tokenizer
) -> None:
    source = DatasetsSource(**source_of("saved"))
    config = DataConfig(tokenizer="given", train=source, validation=source)
    with pytest.raises(ValueError, match=r'validation_documents is "all", but data\.train reads .*saved'):
        check_data(config, byte_tokenizer.fingerprint)
    held_out = [row.text for row in open_text(source, split="held_out").read(repeat=False) if row.text]
    assert held_out == [text for text in TEXTS if is_held_out(text)] != []


@pytest.mark.parametrize("name", ["parquet", "hub streamed"])
def test_a_dataset_is_prepared_into_shards(
    source_of: Make, name: str, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = _open(**source_of(name))
    prepare(tmp_path / "out", source, byte_tokenizer, PrepareOptions(shard_tokens=200))
    manifest = read_manifest(tmp_path / "out")
    assert sum(split.documents for split in manifest.splits.values()) == len(TEXTS)
    assert len(manifest.shards) > 3


def test_the_command_line_prepares_online_and_reads_its_cache_offline(
    hub: HubServer, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}

    def run(out: str, *words: str) -> "subprocess.CompletedProcess[str]":
        arguments = ["--dataset", REPOSITORY, "--tokenizer", str(tmp_path), "--out", str(tmp_path / out)]
        return subprocess.run(
            [sys.executable, "-m", "data.shards", "prepare", *arguments, "--processes", "0", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = run("out", "--revision", COMMIT)
    assert done.returncode == 0, done.stderr
    assert f"{REPOSITORY} at revision {COMMIT}" in done.stdout
    shards, dataset = ShardsSource(folder=str(tmp_path / "out")), DatasetsSource(path=REPOSITORY)
    with pytest.raises(ValueError, match=r'is "all", but data\.train reads org/set \(default, train\) too'):
        check_overlap(DataConfig(tokenizer="given", train=shards, validation=dataset))
    environment["HF_HUB_OFFLINE"] = "1"
    num_requests = len(hub.log)
    done = run("again", "--revision", COMMIT)
    assert done.returncode == 0, done.stderr
    for words, message in (
        (["--revision", OTHER_COMMIT], f"and the cache holds '{COMMIT}'"),
        (["--revision", COMMIT, "--split", "test"], "split is 'test'"),
    ):
        done = run("other", *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert len(hub.log) == num_requests
