"""Writing one shard, and then the index and the manifest of all."""

import contextlib
import hashlib
import shutil
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from data.shards.encode import EncodedDocument
from data.sources.base import Position
from data.sources.shard_format import (
    DOCUMENT,
    INDEX,
    MANIFEST_FILE,
    PARTIAL,
    SHARD_FILE,
    SPLITS,
    TOKEN,
    Manifest,
    ShardSplit,
    ShardSummary,
    SplitSummary,
    file_sha256,
    index_file,
    read_shard,
    replace,
    shard_folder,
    write_json,
)


class ShardWriter:
    """Writes a shard beside its place; only `finish` puts it there, and whole."""

    def __init__(self, folder: Path, number: int, first: Position | None) -> None:
        """Begin a shard.

        Args:
            folder: The folder of all.
            number: Of the shard.
            first: Position in the source at which it begins.
        """
        self._place = shard_folder(folder, number)
        self._partial = self._place.with_name(self._place.name + PARTIAL)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files = contextlib.ExitStack()
        self._splits = {split: _SplitWriter(self._partial, split, self._files) for split in SPLITS}
        self._skipped: Counter[str] = Counter()
        self.first = first

    def __enter__(self) -> "ShardWriter":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and remove what was not finished."""
        self._files.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return sum(split.num_tokens for split in self._splits.values())

    def add(self, document: EncodedDocument) -> None:
        """Write a document where it belongs."""
        self._splits[document.split].add(document)

    def skip(self, reason: str) -> None:
        """Count a row that is no document."""
        self._skipped[reason] += 1

    def finish(self, following: Position | None, *, is_last: bool) -> ShardSummary:
        """Put the shard in its place.

        Args:
            following: Position in the source after its last row.
            is_last: Whether nothing follows.
        """
        splits = {split: writer.finish() for split, writer in self._splits.items()}
        self._files.close()
        summary = ShardSummary(
            first=self.first,
            next=following,
            is_last=is_last,
            skipped=dict(sorted(self._skipped.items())),
            splits=splits,
        )
        write_json(self._partial / SHARD_FILE, summary)
        replace(self._partial, self._place)
        return summary


class _SplitWriter:
    """Writes one split of a shard."""

    def __init__(self, folder: Path, split: ShardSplit, files: contextlib.ExitStack) -> None:
        self._tokens = _HashedFile(folder / f"{split}.tokens", files)
        self._documents = _HashedFile(folder / f"{split}.documents", files)
        self.num_tokens = self.num_documents = 0

    def add(self, document: EncodedDocument) -> None:
        length = len(document.tokens) // TOKEN.itemsize
        self._tokens.write(document.tokens)
        self._documents.write(np.array((length, document.crc32), dtype=DOCUMENT).tobytes())
        self.num_tokens += length
        self.num_documents += 1

    def finish(self) -> SplitSummary:
        hashes = {"tokens": self._tokens.sha256(), "documents": self._documents.sha256()}
        return SplitSummary(documents=self.num_documents, tokens=self.num_tokens, sha256=hashes)


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        self._file: IO[bytes] = files.enter_context(path.open("wb"))
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_manifest(folder: Path, num_shards: int, settings: dict[str, Any]) -> Manifest:
    """Write the indices of all shards and then the manifest, which makes the folder whole.

    Args:
        folder: The folder of all.
        num_shards: Number of its shards.
        settings: What was prepared.

    Raises:
        ValueError: If a shard cannot be read.
    """
    shards = [read_shard(folder, number) for number in range(num_shards)]
    splits: dict[ShardSplit, SplitSummary] = {}
    for split in SPLITS:
        path = index_file(folder, split)
        partial = path.with_name(path.name + PARTIAL)
        start = 0
        with partial.open("wb") as file:
            for number in range(num_shards):
                documents = np.fromfile(shard_folder(folder, number) / f"{split}.documents", dtype=DOCUMENT)
                file.write(index_records(documents, start).tobytes())
                start += int(documents["length"].sum(dtype=np.uint64))
            file.write(np.array((start, 0), dtype=INDEX).tobytes())
        replace(partial, path)
        splits[split] = SplitSummary(
            documents=sum(shard.splits[split].documents for shard in shards),
            tokens=sum(shard.splits[split].tokens for shard in shards),
            sha256={"index": file_sha256(path)},
        )
    skipped = sum((Counter(shard.skipped) for shard in shards), Counter[str]())
    manifest = Manifest(
        settings=settings,
        skipped=dict(sorted(skipped.items())),
        splits=splits,
        shards=[shard.splits for shard in shards],
    )
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def index_records(documents: np.ndarray, start: int) -> np.ndarray:
    """Turn a shard's lengths into records of the index.

    Args:
        documents: Of dtype `DOCUMENT`, `[n]`.
        start: Tokens of the shards before.

    Returns:
        Of dtype `INDEX`, `[n]`.
    """
    records = np.empty(len(documents), dtype=INDEX)
    ends = np.cumsum(documents["length"], dtype=np.uint64)
    records["start"] = start + ends - documents["length"]
    records["crc32"] = documents["crc32"]
    return records
