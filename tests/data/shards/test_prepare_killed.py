"""Preparing shards from the command line, killed and interrupted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.shards import __main__ as shards
from data.sources.shard_format import shard_folder
from data.tokenizer import Tokenizer
from errors import run_command
from tests.data.shards.folders import bytes_of, problems_of

ROOT = Path(__file__).parents[3]


def _command(tokenizer: Path, corpus: Path, folder: Path, *words: str) -> list[str]:
    return [
        *(sys.executable, "-m", "data.shards", "prepare", "--files", str(corpus)),
        *("--tokenizer", str(tokenizer), "--out", str(folder), "--shard-tokens", "20000", *words),
    ]


@pytest.fixture
def corpus(write_parquet: Callable[..., Path], byte_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    texts = [f"{index} " + "words of a document " * (index % 11) for index in range(12_000)]
    return write_parquet("corpus.parquet", texts, row_group_size=1000)


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_kill_9_loses_no_shard_and_leaves_no_process(corpus: Path, tmp_path: Path) -> None:
    tokenizer, killed, whole = tmp_path / "tokenizer.json", tmp_path / "killed", tmp_path / "whole"
    for num_finished in (1, 20, 45):
        process = subprocess.Popen(
            _command(tokenizer, corpus, killed, "--processes", "2"),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not shard_folder(killed, num_finished).exists():
                assert process.poll() is None, "it finished before it could be killed"
                time.sleep(0.002)
            children = _children(process.pid)
            assert len(children) >= 2
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + 10
        while any(map(_is_running, children)):
            assert time.monotonic() < deadline, "the worker processes outlived the killed one"
            time.sleep(0.05)
        assert not (killed / "manifest.json").exists()
    done = subprocess.run(
        _command(tokenizer, corpus, killed, "--processes", "2"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "100.0%" in done.stderr
    assert "left" in done.stderr
    assert shards.main(_command(tokenizer, corpus, whole, "--processes", "0")[3:]) == 0
    assert bytes_of(killed) == bytes_of(whole)
    assert problems_of(killed) == []


def test_ctrl_c_shuts_the_workers_down(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = subprocess.Popen(
        _command(tmp_path / "tokenizer.json", corpus, folder, "--processes", "1"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell makes its background jobs ignore interrupts, which their children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not shard_folder(folder, 2).exists():
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted; finished shards are kept" in printed
    assert "Traceback" not in printed
    assert not list((folder / "shards").glob("*.partial"))


def test_an_interrupt_before_a_writer_can_clean_up_leaves_no_partial_shard(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data.shards.writer._SplitWriter", interrupted)
    folder = tmp_path / "out"
    words = _command(tmp_path / "tokenizer.json", corpus, folder, "--processes", "0")[3:]
    assert run_command(lambda: shards.main(words)) == 130
    assert list((folder / "shards").iterdir()) == []
