"""Writing to disk: files that are replaced atomically, and the space that is left.

Every package writes through it: a reader, a crash or a power cut sees the old file or the new one.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import FULL_DISK, UserError


class DiskFullError(UserError):
    """A file that a full disk, or a quota, does not let us write; the message says how much is free."""


def replace(partial: Path, path: Path) -> None:
    """Rename a file or a folder to its final path, after its content is synced to disk."""
    for each in [*sorted(partial.iterdir()), partial] if partial.is_dir() else [partial]:
        _sync(each)
    os.replace(partial, path)
    _sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file that replaces a file at the end, synced to disk.

    Args:
        path: The file to replace or create.

    Yields:
        The path to write to, of this call alone: of two writers the last one to end wins, whole. After an
        error nothing is left there, and the file is as it was.

    Raises:
        DiskFullError: The disk is full.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with naming_full_disk(path):
        try:
            yield temporary
            replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Convert the error of a full disk, which names no file, to one that says how much is free.

    Args:
        path: What is written: a file, or a folder of files.

    Raises:
        DiskFullError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        problem = f"{error.strerror}, {describe_free(path)}"
        raise DiskFullError(f"{path} cannot be written: {problem}; make room for it") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically.

    Raises:
        DiskFullError: The disk is full.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def free_bytes(path: Path) -> int:
    """Return the bytes that can be written to a path that may not exist yet."""
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def describe_free(path: Path) -> str:
    """Return how much space is left for a path, as in "3.2 MB are free"."""
    return f"{format_bytes(free_bytes(path))} are free"


def format_bytes(size: float) -> str:
    """Format a size in GB, or in MB below 1 GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
