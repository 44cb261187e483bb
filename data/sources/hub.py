"""The "hub" source: parquet files of a dataset on the Hugging Face hub, downloaded whole and ahead of need.

Processes of a node share the hub client's cache: the first one downloads a file, the others wait for it.
While one file is read, the next one is downloaded. Nothing is deleted: a run of 84B tokens leaves some 250 GB
in the cache (`python -m data.shards prepare --delete-downloads` deletes each file once it is tokenized).
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
    """A parquet file of a dataset on the hub; a row's number is its index.

    Args:
        name: The file's path in the repository.
        source: The repository, the revision and the columns.
    """

    def __init__(self, name: str, source: HubSource) -> None:
        self._name = name
        self._source = source
        self._download: Future[Path] | None = None
        self._num_rows: int | None = None

    def __str__(self) -> str:
        return f"{self._source.repository}/{self._name}"

    @property
    def identity(self) -> list[Any]:
        """The file's path in the repository; the revision determines its content."""
        return [self._name]

    def check(self) -> None:
        """Do nothing: whether the file exists is known only once it is downloaded."""

    def read(self, row: int) -> Iterator[RawRow]:
        """Download the file if needed and yield rows in order from a given one.

        Args:
            row: Index of the first row to read.

        Raises:
            DamagedFileError: The file is damaged.
            UserError: The file cannot be downloaded, or lacks a column.
        """
        self.prefetch()
        assert self._download is not None
        try:
            local = ParquetDocumentFile(self._download.result(), self._source)
        finally:
            # the next read downloads again: the file may be deleted until then, or the download may have
            # failed
            self._download = None
        local.check()
        self._num_rows = local.num_rows
        yield from local.read(row)

    def progress(self, row: int) -> float:
        """Return the fraction of the file that precedes a row; 0 until it is downloaded."""
        return row / self._num_rows if self._num_rows else 0.0

    def prefetch(self) -> None:
        """Start downloading the file in the background; `read` waits for it and raises its error."""
        if self._download is None:
            self._download = Future()
            # a daemon thread, so that a program can exit during a download that nobody reads
            threading.Thread(target=self._run, args=(self._download,), name="fetch", daemon=True).start()

    def discard(self) -> None:
        """Delete the file from the cache, if it is there."""
        source = self._source
        cached = try_to_load_from_cache(
            source.repository, self._name, revision=source.revision, repo_type="dataset"
        )
        if isinstance(cached, str):
            blob = Path(cached).resolve()
            Path(cached).unlink()
            blob.unlink(missing_ok=True)

    def _run(self, future: Future[Path]) -> None:
        source = self._source
        try:
            future.set_result(
                download(source.repository, self._name, revision=source.revision, kind="dataset")
            )
        except BaseException as error:
            future.set_exception(error)


def hub_files(source: HubSource) -> list[HubDocumentFile]:
    """Return the files of a hub source, in order; nothing is downloaded yet."""
    return [HubDocumentFile(name, source) for name in source.file_names]
