"""One process per folder: flock, and a record renewed every few seconds where flock does not reach.

flock is released by the system when its process dies, but some file systems have none (ENOSYS, ENOLCK,
EOPNOTSUPP), and others one that holds on a single host (Lustre's localflock, NFS' local_lock), which is not
told. So the holder also writes a record into the file and renews it. What flock grants is final on one host;
the record of another host is watched, and one that does not change was left by a process that has died.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from errors import RUN_ERROR_CODE, UserError

logger = logging.getLogger("parallax")

BEAT_SECONDS = 5.0
"""Time between two renewals of the record."""
WATCH_SECONDS = 20.0
"""Time after which a record that is not renewed belongs to a process that has died."""
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 0.2
# one write of this size replaces the whole record
_RECORD_BYTES = 1024
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LockedError(UserError):
    """Another process holds the lock; the message is "process N on HOST, since TIME"."""


class FolderLock:
    """Lock of a folder: held by one process at a time, and by none of the processes that it forks.

    Args:
        path: The lock's file, in the folder. It is created, and stays when the lock is released.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._has_flock = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="folder lock", daemon=True)
        self._record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "boot": _boot_id(),
            "launch": secrets.token_hex(8),
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        }

    def acquire(self) -> None:
        """Take the lock and renew its record from a thread, or raise.

        Where the record is that of another host, or without flock, this takes up to WATCH_SECONDS.

        Raises:
            LockedError: Another process holds the lock.
            OSError: The file cannot be written.
        """
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # a forked child would keep the lock when this process dies
        os.register_at_fork(after_in_child=self._close)
        try:
            is_taken = try_flock(self._fd, fcntl.LOCK_EX)
            if is_taken is False:
                time.sleep(_LOOK_SECONDS)  # is_held has it for an instant
                is_taken = try_flock(self._fd, fcntl.LOCK_EX)
            if is_taken is False:
                raise LockedError(describe_holder(_read(self._path)))
            self._has_flock = is_taken is True
            self._wait_for_record()
            self._write(0)
        except BaseException:
            self._close()
            raise
        self._thread.start()

    def confirm(self) -> None:
        """Give the lock up and raise if another process has written its record since.

        Without flock, two processes that start at the same time both pass acquire, and the first to write its
        record finds the other's here.

        Raises:
            LockedError: The lock is another's.
        """
        if self._fd is not None and self._is_taken_over():
            self.release()  # else its thread would end this process in the middle of the refusal
            raise LockedError(describe_holder(_read(self._path)))

    def release(self) -> None:
        """Release the lock, and clear its record, so that the next process need not watch it."""
        if self._fd is None:
            return
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        try:
            if not self._is_taken_over():
                os.ftruncate(self._fd, 0)
            if self._has_flock:
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # also for children that a library forked in C
        except OSError as error:
            logger.warning(f"{self._path} could not be released ({error}); it ends with this process")
        self._close()

    def _wait_for_record(self) -> None:
        """Return once the record's process is known to have ended; raise if it lives."""
        first = record = _read(self._path)
        if self._has_flock and _decode(first).get("boot", _boot_id()) == _boot_id():
            return
        deadline = time.monotonic() + WATCH_SECONDS
        if first:
            holder = describe_holder(first)
            logger.info(f"{self._path} was not released: watching whether it is renewed by {holder}")
        while record and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            record = _read(self._path)
            if record not in (b"", first):
                raise LockedError(describe_holder(record))

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                if self._is_taken_over():
                    self._abandon()
                self._write(beat)
            except OSError as error:
                # the disk may be full for a while
                if not self._ended.is_set():
                    logger.warning(f"{self._path} could not be renewed: {error}")

    def _is_taken_over(self) -> bool:
        launch = _decode(_read(self._path)).get("launch")
        return launch not in (None, self._record["launch"])

    def _abandon(self) -> None:
        """End this process at once: whatever it wrote would be mixed with what the other one writes."""
        holder = describe_holder(_read(self._path))
        print(f"error: {self._path.parent} was taken over by {holder}", file=sys.stderr, flush=True)
        os._exit(RUN_ERROR_CODE)

    def _write(self, beat: int) -> None:
        assert self._fd is not None
        record = json.dumps({**self._record, "beat": beat})
        os.pwrite(self._fd, record.ljust(_RECORD_BYTES - 1).encode() + b"\n", 0)
        os.fsync(self._fd)

    def _close(self) -> None:
        # close alone: LOCK_UN in a forked child would release the parent's lock
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def try_flock(fd: int, operation: int) -> bool | None:
    """Take a flock without waiting.

    Args:
        fd: Descriptor, open for reading and, for LOCK_EX, for writing: NFS asks for it.
        operation: fcntl.LOCK_EX or fcntl.LOCK_SH.

    Returns:
        True if it is taken, False if another process holds it, None if the file system has no flock.

    Raises:
        OSError: Any other failure.
    """
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def is_held(path: Path) -> bool:
    """Return whether a process holds a lock.

    Args:
        path: The lock's file; may not exist.

    Returns:
        What flock tells; for a holder on another host, which flock may not reach, whether the record was
        renewed in the last WATCH_SECONDS.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if try_flock(fd, fcntl.LOCK_SH) is False:
            return True
        seconds = time.time() - os.fstat(fd).st_mtime
    finally:
        os.close(fd)
    record = _decode(_read(path))
    return record.get("boot", _boot_id()) != _boot_id() and seconds < WATCH_SECONDS


def describe_holder(record: bytes) -> str:
    """Return "process N on HOST, since TIME" for the content of a lock's file."""
    try:
        fields = _decode(record)
        return f"process {fields['process']} on {fields['host']}, since {fields['since']}"
    except KeyError:
        return "a process that has not written its name"


def _read(path: Path) -> bytes:
    # opened anew each time: network file systems look at the server when a file is opened
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _decode(record: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(record)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _boot_id() -> str:
    # differs between hosts of one name, such as containers, and between two boots of a host
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()
