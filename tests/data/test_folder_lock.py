"""A folder's lock: whom it refuses, and when it is free, with flock, without it, and with a local one."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data import folder_lock
from data.folder_lock import FolderLock, LockedError, is_held

ROOT = Path(__file__).parents[2]
# argv: the lock's file, an errno that flock fails with, or 0
HOLDER = """
import fcntl, os, sys, time
from pathlib import Path
from data import folder_lock
folder_lock.BEAT_SECONDS, folder_lock.WATCH_SECONDS = 0.2, 2.0
def flock(fd, operation):
    raise OSError(int(sys.argv[2]), "no flock")
if sys.argv[2] != "0":
    fcntl.flock = flock
lock = folder_lock.FolderLock(Path(sys.argv[1]))
lock.acquire()
if sys.argv[3:] == ["fork"]:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
print("held", flush=True)
sys.stdin.read()
lock.release()
print("released", flush=True)
"""

Process = subprocess.Popen[str]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 2.0)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no flock")

    monkeypatch.setattr(fcntl, "flock", flock)


def hold(path: Path, error: int = 0, *words: str) -> Process:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), str(error), *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process


def wait_for(process: Process, word: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] == word:
            return lines
    raise AssertionError(lines)


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Process]]:
    path = tmp_path / "lock"
    process = hold(path, *getattr(request, "param", ()))
    try:
        yield path, process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_by_host_process_and_time(held: tuple[Path, Process]) -> None:
    path, process = held
    wait_for(process, "held")
    with pytest.raises(
        LockedError, match=rf"process {process.pid} on {socket.gethostname()}, since 20\d\d-\d\d-\d\d "
    ):
        FolderLock(path).acquire()
    process.communicate("", timeout=20)
    assert path.read_bytes() == b""
    lock = FolderLock(path)
    lock.acquire()
    lock.confirm()
    lock.release()


@pytest.mark.parametrize("held", [(0, "fork")], indirect=True)
def test_a_forked_child_kept_the_lock_of_a_killed_process(held: tuple[Path, Process]) -> None:
    path, process = held
    child = int(wait_for(process, "held")[-2])
    try:
        with pytest.raises(LockedError):
            FolderLock(path).acquire()
        process.kill()
        process.wait(timeout=20)
        os.kill(child, 0)  # it lives
        began = time.monotonic()
        lock = FolderLock(path)
        lock.acquire()  # flock is final on one host: nothing to watch
        assert time.monotonic() - began < 1.0
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("held", [(errno.ENOSYS,), (errno.EOPNOTSUPP,)], indirect=True)
def test_without_flock_a_live_process_is_refused_and_a_dead_one_is_followed(
    held: tuple[Path, Process], without_flock: None
) -> None:
    path, process = held
    wait_for(process, "held")
    for _ in range(3):
        with pytest.raises(LockedError, match=f"process {process.pid} on "):
            FolderLock(path).acquire()
    process.kill()
    process.wait(timeout=20)
    began = time.monotonic()
    lock = FolderLock(path)
    lock.acquire()
    assert time.monotonic() - began >= 2.0
    lock.release()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("held", [(errno.ENOLCK,)], indirect=True)
def test_without_flock_a_stopped_process_ends_once_its_folder_was_taken(
    held: tuple[Path, Process], without_flock: None
) -> None:
    path, process = held
    wait_for(process, "held")
    process.send_signal(signal.SIGSTOP)
    lock = FolderLock(path)
    lock.acquire()
    process.send_signal(signal.SIGCONT)
    assert process.stdout is not None
    assert f"{path.parent} was taken over by process {os.getpid()} on" in process.stdout.read()
    assert process.wait(timeout=20) == 1
    lock.confirm()
    lock.release()


def test_without_flock_one_of_two_that_start_together_is_refused(
    tmp_path: Path, without_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 60.0)
    path = tmp_path / "lock"
    first, second = FolderLock(path), FolderLock(path)
    first.acquire()
    path.write_bytes(b"")  # the second has looked before the first wrote
    second.acquire()
    second.confirm()
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        first.confirm()
    # a refused lock is not renewed, and does not end its process later
    assert not first._thread.is_alive()
    second.confirm()
    second.release()


def test_a_flock_that_does_not_reach_the_other_host(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    record = {
        "host": "node7",
        "process": 42,
        "boot": "other",
        "launch": "abc",
        "since": "2026-11-29 12:00:00",
    }
    ended = threading.Event()

    def beat() -> None:
        for number in range(1000):
            path.write_text(json.dumps({**record, "beat": number}))
            if ended.wait(0.2):
                break

    path.write_text(json.dumps(record))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LockedError, match="process 42 on node7, since 2026-11-29 12:00:00"):
            FolderLock(path).acquire()
    finally:
        ended.set()
        thread.join()
    began = time.monotonic()
    lock = FolderLock(path)
    lock.acquire()
    assert time.monotonic() - began >= 2.0
    lock.release()


def test_a_full_disk_and_a_broken_record_do_not_end_a_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"\xff not JSON")
    lock = FolderLock(path)
    lock.acquire()
    path.write_bytes(b"[1]")
    lock.confirm()
    time.sleep(0.5)
    assert json.loads(path.read_bytes())["process"] == os.getpid()
    path.unlink()
    lock.confirm()
    lock.release()


def test_a_look_tells_whether_a_lock_is_held_and_does_not_refuse_anyone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    process = hold(path)
    wait_for(process, "held")
    assert is_held(path)
    process.kill()
    process.wait()
    assert not is_held(path)
    # a process that looks has the lock for an instant
    with path.open("r+") as looking:
        fcntl.flock(looking.fileno(), fcntl.LOCK_SH)
        timer = threading.Timer(0.05, lambda: fcntl.flock(looking.fileno(), fcntl.LOCK_UN))
        timer.start()
        lock = FolderLock(path)
        lock.acquire()
        timer.join()
        lock.release()


def test_a_look_needs_no_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    process = hold(path)
    wait_for(process, "held")
    system_open = os.open

    def open_to_read(path: str, flags: int, *more: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return system_open(path, flags, *more)

    monkeypatch.setattr(os, "open", open_to_read)
    assert is_held(path)
    process.kill()
    process.wait()
    assert not is_held(path)


def test_the_record_of_another_host_is_held_while_it_is_renewed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(
        json.dumps({"boot": "another", "host": "far", "process": 1, "launch": "x", "since": "now"})
    )
    assert is_held(path)
    os.utime(path, (time.time() - 60, time.time() - 60))
    assert not is_held(path)
