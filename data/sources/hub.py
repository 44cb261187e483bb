"""Documents from parquet files on the Hugging Face hub, each file fetched whole and ahead of need.

Every process reads the files of its node's cache: the first one to ask fetches, the others wait for it. While
a file is read the next one is on its way. Nothing is deleted: a run of 84B tokens leaves some 250 GB in the
cache (`python -m data.shards prepare --delete-downloads` keeps only what it still needs).
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from data.config import HubSource
from data.hub_client import download
from data.sources.files import RawRow
from data.sources.parquet import ParquetDocumentFile


class HubDocumentFile:
    """A parquet file of a data set on the hub; a row is known by its index."""

    def __init__(self, name: str, source: HubSource) -> None:
        """Name the file; nothing is fetched yet.

        Args:
            name: Its path in the repository.
            source: The repository, the revision and the columns.
        """
        self._name = name
        self._source = source
        self._fetched: Future[Path] | None = None
        self._num_rows: int | None = None

    def __str__(self) -> str:
        """Name the file."""
        return f"{self._source.repository}/{self._name}"

    @property
    def identity(self) -> list[Any]:
        """The file's path in the repository; the revision says what is in it."""
        return [self._name]

    def check(self) -> None:
        """Do nothing: only fetching would tell whether the file is there."""

    def read(self, row: int) -> Iterator[RawRow]:
        """Fetch the file if need be and yield every row from one on.

        Args:
            row: Index of the row to begin with.

        Raises:
            DamagedFileError: If the file is damaged.
            ValueError: If it cannot be fetched, or lacks a column.
        """
        self.prefetch()
        assert self._fetched is not None
        try:
            local = ParquetDocumentFile(self._fetched.result(), self._source)
        finally:
            # A file that was removed, or could not be fetched, is to be fetched anew the next time.
            self._fetched = None
        local.check()
        self._num_rows = local.num_rows
        yield from local.read(row)

    def share_before(self, row: int) -> float:
        """Return how much of the file lies before a row, 0 until it is fetched."""
        return row / self._num_rows if self._num_rows else 0.0

    def prefetch(self) -> None:
        """Begin to fetch the file in the background; reading it waits, and raises what went wrong."""
        if self._fetched is None:
            self._fetched = Future()
            # A daemon, since no program should wait at its end for a file that nobody will read.
            threading.Thread(target=self._fetch, args=(self._fetched,), name="fetch", daemon=True).start()

    def discard(self) -> None:
        """Remove the file from the cache, if it is there."""
        source = self._source
        cached = try_to_load_from_cache(
            source.repository, self._name, revision=source.revision, repo_type="dataset"
        )
        if isinstance(cached, str):
            blob = Path(cached).resolve()
            Path(cached).unlink()
            blob.unlink(missing_ok=True)

    def _fetch(self, fetched: Future[Path]) -> None:
        source = self._source
        try:
            fetched.set_result(
                download(source.repository, self._name, revision=source.revision, kind="dataset")
            )
        except BaseException as error:
            fetched.set_exception(error)


def hub_files(source: HubSource) -> list[HubDocumentFile]:
    """Name the files of a hub source, in order.

    Args:
        source: Which files.
    """
    return [HubDocumentFile(name, source) for name in source.file_names]
