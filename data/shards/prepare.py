"""From a source of text to a folder of token shards: one process reads and writes, the others tokenize.

Rows are read in order and sent in batches to as many processes as there are cores; what comes back is written
in the same order. A shard ends with the document that brings it to its size. Where it ends therefore depends
on the text alone, and a preparation that was killed and goes on writes the same bytes as one that was not.
At most a few batches a process are in memory.
"""

import contextlib
import fcntl
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.shards.encode import Encode, EncodedDocument, encoder
from data.shards.writer import ShardWriter, write_manifest
from data.sources.base import Position, Row, batches
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

_BATCH_CHARACTERS = 1 << 18
_BATCH_ROWS = 256
_BATCHES_A_PROCESS = 4


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How to prepare; another number of processes writes the same bytes.

    Attributes:
        shard_tokens: A shard ends with the document that brings it to this many tokens.
        max_tokens: End with the document that brings all shards to this many tokens; None for all.
        num_processes: Processes that tokenize; 0 tokenizes in this one.
        delete_downloads: Whether to remove a file of the hub from the cache once its shards are finished.
    """

    shard_tokens: int = 1 << 26
    max_tokens: int | None = None
    num_processes: int = 0
    delete_downloads: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that make no shard."""
        for name in ("shard_tokens", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        if self.num_processes < 0:
            raise ValueError(f"num_processes is {self.num_processes}, must be 0 (this one alone) or more")


class Progress(NamedTuple):
    """How far a preparation is.

    Attributes:
        share: Of the source (or of `max_tokens`) that is done, from 0 to 1.
        tokens: Written so far, by earlier preparations of the folder too.
        documents: Likewise.
        shards: Finished so far.
    """

    share: float
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
    """Write a source's documents as token shards, or go on where an earlier call stopped.

    A shard that was deleted, or lacks files or parts of them, is written anew; whole ones are not touched.

    Args:
        folder: Where to write.
        source: The documents, of every split, in the order in which they lie.
        tokenizer: Turns them into tokens.
        options: How to do it.
        description: What the manifest says of the source besides.
        report: Called now and then.

    Returns:
        The manifest of the whole.

    Raises:
        ValueError: If the folder holds something else, another process is preparing it, the source cannot be
            read or holds no document.
    """
    settings = _settings(source, tokenizer, options, description)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        _begin(folder, settings)
        if (manifest := _finished(folder)) is not None:
            return manifest
        for name in (folder / MANIFEST_FILE, *(index_file(folder, split) for split in SPLITS)):
            name.unlink(missing_ok=True)
        try:
            with encoder(tokenizer, options.num_processes) as encode:
                preparation = _Preparation(folder, source, options, encode, report)
                preparation.run()
        finally:
            _remove_partial(folder)  # an interrupt may come before a writer can tidy up after itself
        return write_manifest(folder, preparation.num_shards, settings)


class _Preparation:
    """One call of `prepare`: walks the shards in order and writes those that are missing."""

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

    def run(self) -> None:
        """Write every shard that is missing."""
        while not self._is_done:
            if shard_folder(self._folder, self.num_shards).exists():
                self._pass_over(read_shard(self._folder, self.num_shards))
            else:
                self._write_on()
        self._tell()
        if not self._num_documents:
            raise ValueError(f"{self._source} holds no document: name other files, or filter less")

    def _pass_over(self, shard: ShardSummary) -> None:
        if shard.first != self._position:
            place = shard_folder(self._folder, self.num_shards)
            raise ValueError(
                f"{place} begins at {shard.first}, but the shard before it ends at {self._position}: "
                f"delete {place} and those after it, and run the same command again"
            )
        self._num_tokens += shard.num_tokens
        self._num_documents += shard.num_documents
        self._after_shard(shard)

    def _write_on(self) -> None:
        """Write shards from the position on, until one is there already or nothing is left."""
        with contextlib.closing(self._tokenized()) as rows:
            is_exhausted = False
            while not self._is_done and not shard_folder(self._folder, self.num_shards).exists():
                assert not is_exhausted
                with ShardWriter(self._folder, self.num_shards, self._position) as writer:
                    is_exhausted = self._fill(writer, rows)
                    is_last = is_exhausted or self._has_enough()
                    self._after_shard(writer.finish(self._position, is_last=is_last))
                    self._tell()

    def _fill(self, writer: ShardWriter, rows: Iterator[tuple[Row, EncodedDocument | None]]) -> bool:
        """Write one shard's rows; True if the source has no more."""
        for row, document in rows:
            self._position = row.after
            if document is None:
                writer.skip(row.skipped or "")
                continue
            writer.add(document)
            self._num_tokens += len(document.tokens) // TOKEN.itemsize
            self._num_documents += 1
            if self._num_documents % _BATCH_ROWS == 0:
                self._tell()
            if writer.num_tokens >= self._options.shard_tokens or self._has_enough():
                return False
        return True

    def _has_enough(self) -> bool:
        return self._options.max_tokens is not None and self._num_tokens >= self._options.max_tokens

    def _after_shard(self, shard: ShardSummary) -> None:
        self._position, self._is_done = shard.next, shard.is_last
        self.num_shards += 1
        if self._options.delete_downloads:
            num_read = len(self._source.files) if shard.is_last else (shard.next or {"file": 0})["file"]
            for file in self._source.files[:num_read]:
                if isinstance(file, HubDocumentFile):
                    file.discard()

    def _tell(self) -> None:
        share = 1.0 if self._is_done else self._source.share_before(self._position)
        if self._options.max_tokens is not None:
            share = min(max(share, self._num_tokens / self._options.max_tokens), 1.0)
        self._report(Progress(share, self._num_tokens, self._num_documents, self.num_shards))

    def _tokenized(self) -> Generator[tuple[Row, EncodedDocument | None]]:
        """Yield the source's rows in order, each with what the document has become."""
        waiting: deque[tuple[list[Row], Future[list[EncodedDocument]]]] = deque()
        most = _BATCHES_A_PROCESS * max(self._options.num_processes, 1)
        try:
            for batch in batches(
                self._source.read(self._position, repeat=False), _BATCH_ROWS, _BATCH_CHARACTERS
            ):
                waiting.append((batch, self._encode([row.text for row in batch if row.text is not None])))
                if len(waiting) >= most:
                    yield from _join(*waiting.popleft())
            while waiting:
                yield from _join(*waiting.popleft())
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that tokenizes has died, most likely for want of memory: run the same command "
                "again with fewer --processes; finished shards stay"
            ) from error
        finally:
            for _, future in waiting:
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
    """Say what decides about every byte of the shards."""
    return {
        "format": FORMAT,
        "source": {**(description or {}), "fingerprint": source.fingerprint},
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


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings, and clear away shards that are not whole."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        write_json(path, settings)
    begun = read_json(path)
    saved, now = _decisive(begun), _decisive(settings)
    names = [each.get("tokenizer", {}).get("name") for each in (begun, settings)]
    differences = [
        f"{key} was {saved.get(key)!r} and is {now[key]!r}"
        + (f", that of {names[0]} and {names[1]}" if key == "tokenizer" else "")
        for key in now
        if saved.get(key) != now[key]
    ]
    if differences:
        raise ValueError(
            f"{folder} was begun with other settings ({'; '.join(differences)}): restore them, or prepare "
            "into another folder"
        )
    _remove_partial(folder)
    for place in (folder / SHARDS_FOLDER).glob("*"):
        if place.name.isdigit() and not _is_whole(folder, int(place.name)):
            shutil.rmtree(place)


def _is_whole(folder: Path, number: int) -> bool:
    """Whether a shard's files are there, as long as its shard.json says."""
    place = shard_folder(folder, number)
    if not (place / SHARD_FILE).exists():
        return False
    sizes = {
        place / f"{split}.{suffix}": size
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


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what only describes: the same tokenizer may be found at another place."""
    return {
        "format": settings.get("format"),
        "source": settings.get("source", {}).get("fingerprint"),
        "tokenizer": settings.get("tokenizer", {}).get("fingerprint"),
        "shard_tokens": settings.get("shard_tokens"),
        "max_tokens": settings.get("max_tokens"),
    }


def _finished(folder: Path) -> Manifest | None:
    """Return the manifest of a folder to which nothing is missing."""
    if not (folder / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(folder)
    is_whole = all(shard_folder(folder, number).exists() for number in range(len(manifest.shards)))
    is_whole = is_whole and all(index_file(folder, split).exists() for split in SPLITS)
    return manifest if is_whole else None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep other preparations out; the system ends the lock of a process that was killed."""
    with (folder / "prepare.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is preparing {folder}: wait for it, or stop it") from error
        yield
