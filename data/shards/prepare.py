"""Tokenize a source of text into a folder of shards: one process reads and writes, a pool tokenizes.

Rows are read in order and sent in batches to the pool; results are written in the same order. A shard ends
with the document that reaches its size. Shard boundaries thus depend on the text alone, and a preparation
that is killed and resumed writes the same bytes as an uninterrupted one. Memory is bounded by a few batches
per process.
"""

import contextlib
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.fingerprint import describe_changes, is_older, parts_of
from data.folder_lock import FolderLock, LockedError
from data.shards.encode import Encode, EncodedDocument, encoder
from data.shards.source_files import hash_sources
from data.shards.writer import ShardWriter, write_manifest
from data.sources.base import BATCH_ROWS, Position, Row, batches
from data.sources.files import FileDocuments
from data.sources.hub import HubDocumentFile
from data.sources.shard_format import (
    DOCUMENT,
    FORMAT,
    MANIFEST_FILE,
    PARTIAL,
    SETTINGS_FILE,
    SHARD_FILE,
    SHARDS_FOLDER,
    SPLITS,
    TOKEN,
    Manifest,
    ShardSummary,
    index_file,
    read_json,
    read_manifest,
    read_shard,
    shard_folder,
    write_json,
)
from data.tokenizer import Tokenizer
from disk import naming_full_disk
from errors import UserError

_BATCHES_PER_PROCESS = 4


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of `prepare`; the number of processes does not change the bytes written.

    Attributes:
        shard_tokens: A shard ends with the document that brings it to this many tokens.
        max_tokens: The last shard ends with the document that brings all shards to this many tokens; None for
            the whole source.
        num_processes: Size of the pool that tokenizes; 0 to tokenize in this process.
        delete_downloads: Whether to delete a file of the hub from the cache once its shards are finished.
    """

    shard_tokens: int = 1 << 26
    max_tokens: int | None = None
    num_processes: int = 0
    delete_downloads: bool = False

    def __post_init__(self) -> None:
        for name in ("shard_tokens", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}, must be at least 1")
        if self.num_processes < 0:
            raise UserError(f"num_processes is {self.num_processes}, must be 0 (no other process) or more")


class Progress(NamedTuple):
    """Progress of a preparation, earlier runs of the same preparation included.

    Attributes:
        fraction: Fraction of the source, or of `max_tokens`, from 0 to 1.
        tokens: Tokens written.
        documents: Documents written.
        shards: Finished shards.
    """

    fraction: float
    tokens: int
    documents: int
    shards: int


def prepare(
    folder: Path,
    source: FileDocuments,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    *,
    description: dict[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Write a source's documents as token shards, or resume a preparation that was stopped.

    A shard that is missing, or lacks files or parts of them, is written again; complete ones are not touched.

    Args:
        folder: Folder to write to.
        source: Documents of both splits, not shuffled.
        tokenizer: Tokenizes text.
        options: Sizes and processes.
        description: Further entries about the source in the manifest.
        report: Called with the progress every few hundred documents.

    Returns:
        The manifest of the complete folder.

    Raises:
        UserError: The folder was prepared with other settings, another process is preparing it, or the source
            cannot be read or holds no document.
        DiskFullError: The disk is full; finished shards are kept.
    """
    settings = _settings(source, tokenizer, options, description)
    folder.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(folder), _lock(folder):
        _start(folder, settings)
        if (manifest := _complete_manifest(folder)) is not None:
            return manifest
        for file in (folder / MANIFEST_FILE, *(index_file(folder, split) for split in SPLITS)):
            file.unlink(missing_ok=True)
        try:
            with encoder(tokenizer, options.num_processes) as encode:
                preparation = _Preparation(folder, source, options, encode, report)
                preparation.run()
        finally:
            _remove_partial(folder)  # an interrupt may come before a writer can clean up
        sources = hash_sources(source, preparation.num_files)
        return write_manifest(folder, preparation.num_shards, settings, sources)


class _Preparation:
    """One call of `prepare`: iterates over the shards in order and writes the missing ones."""

    def __init__(
        self,
        folder: Path,
        source: FileDocuments,
        options: PrepareOptions,
        encode: Encode,
        report: Callable[[Progress], None],
    ) -> None:
        self._folder = folder
        self._source = source
        self._options = options
        self._encode = encode
        self._report = report
        self._position: Position | None = None
        self._num_tokens = self._num_documents = 0
        self._is_done = False
        self.num_shards = 0

    @property
    def num_files(self) -> int:
        """Number of files of the source that were read, at least in part."""
        if self._options.max_tokens is None or self._position is None:
            return len(self._source.files)
        return self._position["file"] + 1

    def run(self) -> None:
        """Write every missing shard."""
        while not self._is_done:
            if shard_folder(self._folder, self.num_shards).exists():
                self._skip_shard(read_shard(self._folder, self.num_shards))
            else:
                self._write_shards()
        self._report_progress()
        if not self._num_documents:
            raise UserError(f"{self._source} holds no document: name other files, or relax the filters")

    def _skip_shard(self, shard: ShardSummary) -> None:
        if shard.first != self._position:
            path = shard_folder(self._folder, self.num_shards)
            raise UserError(
                f"{path} starts at {shard.first}, but the previous shard ends at {self._position}: "
                f"delete {path} and the following shards, and run the same command again"
            )
        self._num_tokens += shard.num_tokens
        self._num_documents += shard.num_documents
        self._finish_shard(shard)

    def _write_shards(self) -> None:
        """Write shards from the position until the next one exists or the source is exhausted."""
        with contextlib.closing(self._tokenized_rows()) as rows:
            is_exhausted = False
            while not self._is_done and not shard_folder(self._folder, self.num_shards).exists():
                assert not is_exhausted
                with ShardWriter(self._folder, self.num_shards, self._position) as writer:
                    is_exhausted = self._fill(writer, rows)
                    is_last = is_exhausted or self._has_max_tokens()
                    self._finish_shard(writer.finish(self._position, is_last=is_last))
                    self._report_progress()

    def _fill(self, writer: ShardWriter, rows: Iterator[tuple[Row, EncodedDocument | None]]) -> bool:
        """Write one shard's rows; return whether the source is exhausted."""
        for row, document in rows:
            self._position = row.next_position
            if document is None:
                writer.skip(row.skipped or "")
                continue
            writer.add(document)
            self._num_tokens += len(document.tokens) // TOKEN.itemsize
            self._num_documents += 1
            if self._num_documents % BATCH_ROWS == 0:
                self._report_progress()
            if writer.num_tokens >= self._options.shard_tokens or self._has_max_tokens():
                return False
        return True

    def _has_max_tokens(self) -> bool:
        return self._options.max_tokens is not None and self._num_tokens >= self._options.max_tokens

    def _finish_shard(self, shard: ShardSummary) -> None:
        self._position, self._is_done = shard.next, shard.is_last
        self.num_shards += 1
        if self._options.delete_downloads:
            num_read = len(self._source.files) if shard.is_last else (shard.next or {"file": 0})["file"]
            for file in self._source.files[:num_read]:
                if isinstance(file, HubDocumentFile):
                    file.discard()

    def _report_progress(self) -> None:
        fraction = 1.0 if self._is_done else self._source.progress(self._position)
        if self._options.max_tokens is not None:
            fraction = min(max(fraction, self._num_tokens / self._options.max_tokens), 1.0)
        self._report(Progress(fraction, self._num_tokens, self._num_documents, self.num_shards))

    def _tokenized_rows(self) -> Generator[tuple[Row, EncodedDocument | None]]:
        """Yield the source's rows in order, each with its encoded document."""
        pending: deque[tuple[list[Row], Future[list[EncodedDocument]]]] = deque()
        max_pending = _BATCHES_PER_PROCESS * max(self._options.num_processes, 1)
        try:
            for batch in batches(self._source.read(self._position, repeat=False)):
                pending.append((batch, self._encode([row.text for row in batch if row.text is not None])))
                if len(pending) >= max_pending:
                    yield from _join(*pending.popleft())
            while pending:
                yield from _join(*pending.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenizes has died, most likely out of memory: run the same command "
                "again with fewer --processes; finished shards are kept"
            ) from error
        finally:
            for _, future in pending:
                future.cancel()


def _join(
    batch: list[Row], future: Future[list[EncodedDocument]]
) -> Iterator[tuple[Row, EncodedDocument | None]]:
    documents = iter(future.result())
    for row in batch:
        yield row, next(documents) if row.skipped is None else None


def _settings(
    source: FileDocuments,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    description: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of prepare.json, which determines every byte of the shards."""
    return {
        "format": FORMAT,
        "source": {**(description or {}), "fingerprint": parts_of(source.fingerprint)},
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "end_of_document_id": tokenizer.end_of_document_id,
        },
        "shard_tokens": options.shard_tokens,
        "max_tokens": options.max_tokens,
    }


def _start(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or check those of an earlier run, and delete incomplete shards."""
    path = folder / SETTINGS_FILE
    if path.exists():
        saved_settings = read_json(path)
    elif (folder / MANIFEST_FILE).exists():
        saved_settings = read_manifest(folder).settings
    else:
        saved_settings = settings
    saved, now = _compared(saved_settings), _compared(settings)
    names = [each.get("tokenizer", {}).get("name") for each in (saved_settings, settings)]
    differences = []
    for key in now:
        if saved.get(key) == now[key]:
            continue
        differences.append(f"{key} was {saved.get(key)!r} and is {now[key]!r}")
        if key == "tokenizer":
            differences[-1] += f", the fingerprints of {names[0]} and {names[1]}"
        elif key == "source":
            differences[-1] = f"source was another: {', '.join(describe_changes(saved[key], now[key]))}"
    if is_older(saved["source"], now["source"]):
        raise UserError(
            f"{folder} was prepared by an earlier version, which knew the source by less than its content: a "
            "complete folder can be read as it is, but not be continued; prepare into another folder"
        )
    if differences:
        raise UserError(
            f"{folder} was prepared with other settings ({'; '.join(differences)}): restore them, or prepare "
            "into another folder"
        )
    if not path.exists():
        write_json(path, saved_settings)
    _remove_partial(folder)
    for path in (folder / SHARDS_FOLDER).glob("*"):
        if path.name.isdigit() and not _is_complete(folder, int(path.name)):
            shutil.rmtree(path)


def _is_complete(folder: Path, number: int) -> bool:
    """Return whether a shard's files exist and have the sizes in its shard.json."""
    path = shard_folder(folder, number)
    if not (path / SHARD_FILE).exists():
        return False
    sizes = {
        path / f"{split}.{suffix}": size
        for split, summary in read_shard(folder, number).splits.items()
        for suffix, size in (
            ("tokens", summary.tokens * TOKEN.itemsize),
            ("documents", summary.documents * DOCUMENT.itemsize),
        )
    }
    return all(file.exists() and file.stat().st_size == size for file, size in sizes.items())


def _remove_partial(folder: Path) -> None:
    for partial in (folder / SHARDS_FOLDER).glob(f"*{PARTIAL}"):
        shutil.rmtree(partial)


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change; a tokenizer's name may, since it may be found elsewhere."""
    return {
        "format": settings.get("format"),
        "source": settings.get("source", {}).get("fingerprint"),
        "tokenizer": settings.get("tokenizer", {}).get("fingerprint"),
        "shard_tokens": settings.get("shard_tokens"),
        "max_tokens": settings.get("max_tokens"),
    }


def _complete_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a complete folder; None if anything is missing."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(folder)
    has_shards = all(shard_folder(folder, number).exists() for number in range(len(manifest.shards)))
    has_indices = all(index_file(folder, split).exists() for split in SPLITS)
    return manifest if has_shards and has_indices else None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Exclude other preparations of the folder."""
    lock = FolderLock(folder / "prepare.lock")
    try:
        lock.acquire()
    except LockedError as holder:
        raise UserError(
            f"another process is preparing {folder} ({holder}): wait for it, or stop it"
        ) from holder
    try:
        yield
    finally:
        lock.release()
