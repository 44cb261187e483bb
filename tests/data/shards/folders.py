"""Hashes and problems of a folder of shards, for the tests of shards."""

import hashlib
from pathlib import Path

from data.shards.verify import verify


def bytes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def problems_of(folder: Path) -> list[str]:
    """All problems that `verify` finds."""
    return [problem for _, problems in verify(folder) for problem in problems]
