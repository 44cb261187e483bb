"""Identify a local file by its content: its size, and a hash of all or some of its bytes."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

# a file of at most 4 MiB is hashed whole, of a larger one 16 blocks of 64 KiB at equal distances, the first
# and the last included: a thousand files are identified in seconds
_WHOLE_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 16
_PARQUET_END = b"PAR1"


def content_hash(path: Path) -> str:
    """Return a hash of a file's size and of its content: all of it, or some blocks of a large file.

    Of a parquet file, whatever its name, the whole footer is hashed, which holds sizes, offsets and
    statistics of all columns. An edit of a large text file that keeps its size is found only within the
    blocks; `file_sha256` of data/sources/shard_format.py reads all of it.

    Args:
        path: The file.

    Returns:
        16 hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=8)
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for block in range(_NUM_BLOCKS):
            file.seek(block * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
        digest.update(_parquet_footer(file, size))
        return digest.hexdigest()


def _parquet_footer(file: BinaryIO, size: int) -> bytes:
    """Return the footer of a parquet file; nothing of another file."""
    file.seek(size - 8)
    end = file.read()
    length = int.from_bytes(end[:4], "little")
    if end[4:] != _PARQUET_END or length > size - 8:
        return b""
    file.seek(size - 8 - length)
    return file.read(length)
