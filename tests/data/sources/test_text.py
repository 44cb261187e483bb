import re
from pathlib import Path
from typing import Any

import pytest

from data.config import TextSource
from data.sources.files import FileDocuments
from data.sources.open import open_text
from errors import UserError


def _open(folder: Path, **options: Any) -> FileDocuments:
    return open_text(TextSource(folder=str(folder), **options))


def test_each_file_of_a_folder_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "below" / "deeper").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfafter a BOM\n")
    (tmp_path / "below" / "b.txt").write_bytes(b"not \xff text")
    (tmp_path / "below" / "deeper" / "c.txt").write_text("gr\u00f6\u00dfe\r\n", newline="")
    (tmp_path / "below" / "empty.txt").touch()
    (tmp_path / "huge.txt").write_text("0123456789 " * 1_000_000)
    (tmp_path / "other.md").write_text("another pattern")
    source = _open(tmp_path)
    rows = list(source.read(repeat=False))
    assert [row.skipped for row in rows] == [None, "not_text", None, "empty", None]
    texts = [row.text for row in rows if row.text]
    assert texts == ["after a BOM\n", "gr\u00f6\u00dfe\r\n", "0123456789 " * 1_000_000]
    for index, row in enumerate(rows, 1):
        assert list(source.read(row.next_position, repeat=False)) == rows[index:]
    assert [row.text for row in _open(tmp_path, pattern="*.md").read(repeat=False)] == ["another pattern"]


def test_the_fingerprint_depends_on_the_files_and_not_on_the_folder(tmp_path: Path) -> None:
    for folder, text in (("one", "text"), ("same", "text"), ("longer", "a text")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    one, same, longer = (_open(tmp_path / folder).fingerprint for folder in ("one", "same", "longer"))
    assert one == same != longer


def test_a_missing_folder_or_no_matching_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere', which is not a folder"):
        _open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no file in .* matches pattern '\*\.text'"):
        _open(tmp_path, pattern="*.text")


@pytest.mark.parametrize("pattern", ["**.txt", "/tmp/*.txt"])
def test_a_pattern_that_is_no_relative_glob_is_refused(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=f"pattern of a text source is {re.escape(repr(pattern))}"):
        _open(tmp_path, pattern=pattern)


def test_a_deleted_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text("text")
    source = _open(tmp_path, on_damaged_file="skip")
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*gone\.txt"):
        list(source.read(repeat=False))
