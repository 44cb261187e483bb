"""Folders that cannot be read: globs skip them in silence, a source of documents does not."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.config import JsonlSource, TextSource
from data.sources.open import open_text


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in folders, of which `below/locked` and `lost+found` cannot be read."""
    for folder in ("open", "below/locked", "below/open", "lost+found"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_text('{"text": "a"}\n')
    scan: Callable[..., Any] = os.scandir

    def scan_if_allowed(path: Any = ".") -> Any:
        if Path(path).name in ("locked", "lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_if_allowed)
    return tmp_path


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "below/*/*.jsonl", "*/*/*.jsonl", "*/**/*.jsonl"])
def test_a_folder_that_may_hold_matches_is_named(pattern: str, tree: Path) -> None:
    sources = [JsonlSource(files=[str(tree / pattern)]), TextSource(folder=str(tree), pattern=pattern)]
    for source in sources:
        with pytest.raises(PermissionError) as raised:
            open_text(source)
        assert raised.value.filename == str(tree / "below" / "locked")


@pytest.mark.parametrize("pattern", ["*/*.jsonl", "open/*.jsonl", "below/open/**/*.jsonl", "open/a.jsonl"])
def test_other_folders_do_not_matter(pattern: str, tree: Path) -> None:
    sources = [JsonlSource(files=[str(tree / pattern)]), TextSource(folder=str(tree), pattern=pattern)]
    for source in sources:
        assert [Path(str(file)).name for file in open_text(source).files] == ["a.jsonl"]
