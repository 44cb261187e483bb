"""Documents from a folder of text files, one a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import TextSource
from data.sources.files import RawRow, reading


class TextDocumentFile:
    """A text file: row 0, and no other."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Name the file; nothing is opened yet.

        Args:
            path: The file.
            folder: The folder of the data set, which may move.
        """
        self.path = path
        self._name = path.relative_to(folder).as_posix()
        self._num_bytes = 0

    def __str__(self) -> str:
        """Name the file."""
        return str(self.path)

    @property
    def identity(self) -> list[Any]:
        """The file's path below the folder and its size in bytes."""
        return [self._name, self._num_bytes]

    def check(self) -> None:
        """Take the file's size.

        Raises:
            ValueError: If the file is missing.
        """
        with reading(self.path):
            self._num_bytes = self.path.stat().st_size

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield the document, unless it lies before the row.

        Args:
            row: 0 or 1.

        Raises:
            ValueError: If the file is gone.
        """
        if row == 0:
            with reading(self.path):
                yield RawRow(1, self.path.read_bytes().removeprefix(b"\xef\xbb\xbf"))

    def share_before(self, row: int) -> float:
        """Return how much of the file lies before a row."""
        return float(row)

    def prefetch(self) -> None:
        """Do nothing: the file is here."""


def text_files(source: TextSource) -> list[TextDocumentFile]:
    """Find the files of a folder, sorted by path.

    Args:
        source: The folder and the pattern.

    Raises:
        ValueError: If there is no such folder, or no file of that pattern in it.
    """
    folder = Path(source.folder)
    if not folder.is_dir():
        raise ValueError(f"folder of a text source is {source.folder!r}, which is no folder: correct it")
    paths = sorted(path for path in folder.glob(source.pattern) if path.is_file())
    if not paths:
        raise ValueError(
            f"no file below {source.folder!r} matches pattern {source.pattern!r} of a text source: correct it"
        )
    return [TextDocumentFile(path, folder) for path in paths]
