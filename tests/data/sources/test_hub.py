"""The hub's own client against a loopback server: named files only, and retries after failures."""

import io
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from data import hub_client
from data.config import HubSource
from data.shards.prepare import PrepareOptions, prepare
from data.shards.verify import verify
from data.sources.base import batches
from data.sources.files import FileDocuments
from data.sources.open import open_text
from data.sources.shard_format import read_manifest
from data.tokenizer import Tokenizer
from data.ultra_fineweb import REVISION, part_files
from tests.data.sources.hub_server import COMMIT, DATASET, MODEL, HubServer

ROOT = Path(__file__).parents[3]
NAMES = part_files("en", "1-6")
PARTS = {name: [f"part {number} row {row}" for row in range(40)] for number, name in enumerate(NAMES, 1)}
TEXTS = list(itertools.chain(*PARTS.values()))


def _parquet(texts: list[str], score_type: pa.DataType, padding: int = 0) -> bytes:
    scores = pa.array(np.linspace(0, 1, len(texts))).cast(score_type)
    table = {"content": texts, "score": scores, "source": ["web" + "x" * padding] * len(texts)}
    file = io.BytesIO()
    pq.write_table(pa.table(table), file, row_group_size=16, use_dictionary=False, compression="none")
    return file.getvalue()


@pytest.fixture
def server() -> Iterator[HubServer]:
    server = HubServer()
    # the dtype of the score differs between parts, as in the real dataset
    types = (pa.float64(), pa.float32(), pa.string())
    parts = zip(PARTS.items(), itertools.cycle(types), strict=False)
    server.add_parts({name: _parquet(texts, kind, 500) for (name, texts), kind in parts})
    yield server
    server.close()
    assert server.listed == [], "a repository of tens of thousands of files is never listed"


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The server as this process's hub, with an empty cache and short backoffs."""
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    # the client writes, and so resumes, in chunks of 10 MB
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    close_session()
    yield server
    # a background download must not run into the next test's settings
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(10)


def _open(parts: str = "1-6", **options: Any) -> FileDocuments:
    return open_text(HubSource(parts=parts, **options))


def _texts(source: FileDocuments, position: Any = None) -> list[str | None]:
    return [row.text for row in source.read(position, repeat=False)]


def test_named_parts_are_read_in_order_and_downloaded_once(hub: HubServer) -> None:
    assert REVISION == COMMIT
    assert _texts(_open()) == TEXTS
    assert hub.downloads() == dict.fromkeys(NAMES, 1)
    num_requests = len(hub.log)
    assert _texts(_open("2-3")) == TEXTS[40:120]
    assert len(hub.log) == num_requests, "cached files of a commit need no request"


def test_scores_of_every_dtype_are_filtered(hub: HubServer) -> None:
    rows = list(_open("1-3", min_score=0.5).read(repeat=False))
    assert len([row for row in rows if row.text]) == 60
    assert {row.skipped for row in rows} == {None, "low_score"}


def test_the_next_file_is_downloaded_while_one_is_read(hub: HubServer) -> None:
    rows = _open().read(repeat=True)
    next(rows)
    deadline = time.monotonic() + 5
    while len(hub.downloads()) < 2 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert set(hub.downloads()) == set(NAMES[:2])


@pytest.mark.parametrize("seed", [None, 3])
def test_reading_resumes_from_any_position_and_downloads_no_file_before_it(
    hub: HubServer, seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_text(HubSource(parts="1-6"), shuffle_seed=seed)
    rows = list(itertools.islice(source.read(repeat=True), 300))
    assert sorted(str(row.text) for row in rows[:240]) == sorted(TEXTS)
    for index in range(0, 260, 13):
        again = source.read(rows[index].next_position, repeat=True)
        assert list(itertools.islice(again, 30)) == rows[index + 1 : index + 31]
    # on another machine, only the remaining files are downloaded
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    hub.log.clear()
    again = open_text(HubSource(parts="1-6"), shuffle_seed=seed).read(rows[170].next_position, repeat=False)
    assert list(again) == rows[171:240]
    assert len(hub.downloads()) == 2


FAILURES = {
    "too many requests": [429, 429],
    "out of service": [503, 500, 502],
    "interrupted": [("close", 1000), ("close", 3000)],
    "interrupted before the first byte": [("close", 0), ("close", 0)],
    "interrupted and then out of service": [("close", 2000), 503],
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_transfer_is_retried(hub: HubServer, name: str) -> None:
    hub.failures.extend(FAILURES[name])
    assert _texts(_open("1-2")) == TEXTS[:80]
    assert not hub.failures
    assert len(hub.requests("GET", "^/cdn/")) >= 2 + len(FAILURES[name])


def test_an_interrupted_transfer_resumes_where_it_stopped(hub: HubServer) -> None:
    hub.failures.extend([("close", 1000), ("close", 3000)])
    assert _texts(_open("1")) == TEXTS[:40]
    spans = [span for _, span in hub.requests("GET", "^/cdn/")]
    assert spans == [None, "bytes=1000-", "bytes=4000-"]


def test_a_stalled_transfer_resumes(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.failures.append(("stall", 5000, 0.6))
    assert _texts(_open("1")) == TEXTS[:40]
    assert [span for _, span in hub.requests("GET", "^/cdn/")] == [None, "bytes=5000-"]


def test_a_slow_transfer_is_not_interrupted(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.failures.extend([("stall", 7000, 0.4), ("stall", 0, 0.4)])
    assert _texts(_open("1-2")) == TEXTS[:80]
    assert len(hub.requests("GET", "^/cdn/")) == 2


def test_a_failed_request_for_the_location_of_a_file_is_retried(hub: HubServer) -> None:
    hub.head_failures.extend([503, 429, 500, 504])
    assert _texts(_open("1")) == TEXTS[:40]
    assert not hub.head_failures


def test_backoff_is_exponential_and_an_outage_ends_with_the_cause(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(hub_client, "hf_hub_download", _fail)
    with pytest.raises(ValueError, match=rf"cannot fetch {NAMES[0]} of dataset {DATASET} .* in 14 attempts"):
        _texts(_open("1"))
    assert len(waits) == 13
    assert all(0.5 * 2**index <= wait <= 2**index for index, wait in enumerate(waits[:6]))
    assert all(30 <= wait <= 60 for wait in waits[6:])
    assert sum(waits) > 300
    assert "retrying in" in caplog.text


def test_a_mistyped_tokenizer_is_retried_less_often_than_data(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(hub_client, "hf_hub_download", _fail)
    with pytest.raises(ValueError, match=r"'runs/tok' is not a path, .* in 2 attempts"):
        Tokenizer.load("runs/tok")
    assert len(waits) == 1


def _fail(*arguments: object, **options: object) -> str:
    raise ConnectionResetError("connection reset by peer")


def test_a_missing_file_is_named_even_if_damaged_files_are_skipped(hub: HubServer) -> None:
    del hub.files[f"datasets/{DATASET}"][NAMES[1]]
    source = _open("1-3", on_damaged_file="skip")
    read: list[str | None] = []
    with pytest.raises(
        ValueError, match=rf"cannot fetch {NAMES[1]} of dataset .*the repository has no such file"
    ):
        read.extend(row.text for row in source.read(repeat=False))
    assert not hub.requests("GET", "0002-of-2048")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "0" * 40}, "no such revision"),
        ({"repository": "some/set", "revision": "main", "files": ["a.parquet"]}, "no such repository"),
        ({"repository": "not a name", "revision": "main", "files": ["a.parquet"]}, "not a name"),
    ],
)
def test_a_wrong_repository_or_revision_is_named_without_a_retry(
    hub: HubServer, changes: dict[str, Any], message: str
) -> None:
    source = open_text(HubSource(**changes) if "files" in changes else HubSource(parts="1", **changes))
    with pytest.raises(ValueError, match=f"cannot fetch .*{message}"):
        _texts(source)


@pytest.mark.parametrize("on_damaged_file", ["stop", "skip"])
def test_a_damaged_part_raises_with_its_name_or_is_counted(hub: HubServer, on_damaged_file: str) -> None:
    parts = hub.files[f"datasets/{DATASET}"]
    parts[NAMES[1]] = parts[NAMES[1]][:-700]
    source = _open("1-3", on_damaged_file=on_damaged_file)
    if on_damaged_file == "stop":
        with pytest.raises(ValueError, match=r"cannot read .*part-0002-of-2048\.parquet"):
            _texts(source)
        return
    rows = list(source.read(repeat=False))
    assert [row.text for row in rows if row.text] == TEXTS[:40] + TEXTS[80:120]
    assert [row.skipped for row in rows if row.skipped] == ["damaged_file"]


def test_offline_mode_makes_no_request(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _texts(_open("1")) == TEXTS[:40]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    num_requests = len(hub.log)
    assert _texts(_open("1")) == TEXTS[:40]
    with pytest.raises(ValueError, match=rf"cannot fetch {NAMES[1]} .*HF_HUB_OFFLINE is set"):
        _texts(_open("1-2"))
    assert len(hub.log) == num_requests


def test_a_tokenizer_by_name_is_loaded_from_the_hub(
    hub: HubServer, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    hub.files[MODEL]["tokenizer.json"] = (tmp_path / "tokenizer.json").read_bytes()
    for name in (MODEL, f"{MODEL}@main", f"{MODEL}@{COMMIT}"):
        assert Tokenizer.load(name).fingerprint == byte_tokenizer.fingerprint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert Tokenizer.load(MODEL).fingerprint == byte_tokenizer.fingerprint
    with pytest.raises(
        ValueError, match=r"is not a path, .*cannot fetch tokenizer\.json of model Qwen/Other"
    ):
        Tokenizer.load("Qwen/Other")


def test_preparing_from_the_hub_deletes_downloads_that_are_tokenized(
    hub: HubServer, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.shards.prepare.BATCH_ROWS", 10)
    monkeypatch.setattr("data.shards.prepare.batches", partial(batches, max_rows=10))
    kept: list[int] = []

    def count(progress: Any) -> None:
        kept.append(len(list((tmp_path / "cache").rglob("*.parquet"))))

    options = PrepareOptions(shard_tokens=300, delete_downloads=True)
    prepare(tmp_path / "out", _open(), byte_tokenizer, options, report=count)
    assert max(kept) <= 4, "the file being written, the one being read and the next"
    assert not [path for path in (tmp_path / "cache").rglob("blobs/*") if path.is_file()]
    manifest = read_manifest(tmp_path / "out")
    assert sum(split.documents for split in manifest.splits.values()) == len(TEXTS)
    assert not [problem for _, problems in verify(tmp_path / "out") for problem in problems]


def test_the_command_line_retries_failures_of_the_endpoint_in_the_environment(
    server: HubServer, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    server.files[MODEL]["tokenizer.json"] = (tmp_path / "tokenizer.json").read_bytes()
    server.failures.extend([None, ("close", 1500), 503, 429])
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    words = ["--parts", "1-3", "--tokenizer", MODEL, "--out", str(tmp_path / "out"), "--processes", "1"]

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "data.shards", "prepare", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert f"{DATASET} at revision {COMMIT}" in done.stdout
    assert not server.failures
    num_requests = len(server.log)
    environment["HF_HUB_OFFLINE"] = "1"
    words[1] = "1-4"
    words[5] = str(tmp_path / "more")
    done = run()
    assert done.returncode == 2
    assert "part-0004-of-2048.parquet" in done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(server.log) == num_requests
