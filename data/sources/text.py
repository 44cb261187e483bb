"""The "text" source: a folder of text files, one document per file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import TextSource
from data.sources.content import content_hash
from data.sources.files import RawRow, convert_read_errors
from data.sources.folders import check_folders
from errors import UserError, called


class TextDocumentFile:
    """A text file, whose only row is row 0; it is opened when it is read.

    Args:
        path: The file.
        folder: The dataset's folder, which is not part of the file's identity.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._name = path.relative_to(folder).as_posix()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> list[Any]:
        """The file's path relative to the folder and a hash of its content."""
        with convert_read_errors(self.path):
            return [self._name, content_hash(self.path)]

    def check(self) -> None:
        """Check that the file exists.

        Raises:
            UserError: The file is missing.
        """
        with convert_read_errors(self.path):
            self.path.stat()

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield the document if the row is 0.

        Args:
            row: 0 or 1.

        Raises:
            UserError: The file is gone.
        """
        if row == 0:
            with convert_read_errors(self.path):
                yield RawRow(1, self.path.read_bytes().removeprefix(b"\xef\xbb\xbf"))

    def progress(self, row: int) -> float:
        """Return the fraction of the file that precedes a row."""
        return float(row)

    def prefetch(self) -> None:
        """Do nothing: the file is local."""


def text_files(source: TextSource) -> list[TextDocumentFile]:
    """Find the files of a folder, sorted by path.

    Args:
        source: The folder and the pattern.

    Raises:
        UserError: The folder does not exist, the pattern is no glob, or no file in the folder matches it.
        OSError: A subfolder cannot be read.
    """
    folder = Path(source.folder)
    if not folder.is_dir():
        raise UserError(
            f"{called('folder')} of a text source is {source.folder!r}, which is not a folder: correct it"
        )
    try:
        paths = sorted(path for path in folder.glob(source.pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"{called('pattern')} of a text source is {source.pattern!r} ({error}): want a glob relative to "
            'the folder, such as "**/*.txt"'
        ) from error
    check_folders(folder, source.pattern)
    if not paths:
        raise UserError(
            f"no file in {source.folder!r} matches {called('pattern')} {source.pattern!r} of a text source: "
            "correct it"
        )
    return [TextDocumentFile(path, folder) for path in paths]
