"""Check that the folders that a glob looks into can be read: globs leave out silently what they cannot."""

import glob
import os
from pathlib import Path


def check_folders(folder: Path, pattern: str) -> None:
    """Check that every folder that may hold matches of a glob can be read.

    Args:
        folder: The folder to which the pattern is relative.
        pattern: The glob; "**" stands for any number of folders.

    Raises:
        OSError: A folder cannot be read; its filename is the folder.
    """
    parts = Path(pattern).parts
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = folder.joinpath(*parts[:fixed])
    wildcards = parts[fixed:-1]
    depth = None if "**" in parts[fixed:] else len(wildcards)
    if root.is_dir():
        _check(root, depth)


def _check(folder: Path, depth: int | None) -> None:
    with os.scandir(folder) as entries:
        folders = [
            entry.path
            for entry in entries
            # the file system's own folder, which only root can read
            if depth != 0 and entry.is_dir(follow_symlinks=False) and entry.name != "lost+found"
        ]
    for each in folders:
        _check(Path(each), None if depth is None else depth - 1)
