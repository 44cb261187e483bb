"""What a folder of shards holds, as the tests of shards compare it."""

import hashlib
from pathlib import Path

from data.shards.verify import verify


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file of a folder, hashed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def problems_of(folder: Path) -> list[str]:
    """What is wrong with a folder of shards."""
    return [problem for _, problems in verify(folder) for problem in problems]
