"""Write shards, then the indices and the manifest of the folder."""

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
    SourceFile,
    SplitSummary,
    file_sha256,
    index_file,
    read_shard,
    shard_folder,
    write_json,
)
from disk import replace, replacing


class ShardWriter:
    """Write a shard to a partial folder, which `finish` renames to the shard's folder.

    Args:
        folder: The prepared folder.
        number: The shard's number, from 0.
        first: Position in the source of the shard's first row.
    """

    def __init__(self, folder: Path, number: int, first: Position | None) -> None:
        self._folder = shard_folder(folder, number)
        self._partial = self._folder.with_name(self._folder.name + PARTIAL)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files = contextlib.ExitStack()
        self._splits = {split: _SplitWriter(self._partial, split, self._files) for split in SPLITS}
        self._skipped: Counter[str] = Counter()
        self.first = first

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and delete an unfinished shard."""
        self._files.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return sum(split.num_tokens for split in self._splits.values())

    def add(self, document: EncodedDocument) -> None:
        """Append a document to its split."""
        self._splits[document.split].add(document)

    def skip(self, reason: str) -> None:
        """Count a skipped row."""
        self._skipped[reason] += 1

    def finish(self, next_position: Position | None, *, is_last: bool) -> ShardSummary:
        """Write shard.json and rename the partial folder.

        Args:
            next_position: Position in the source after the shard's last row.
            is_last: Whether this is the last shard.
        """
        splits = {split: writer.finish() for split, writer in self._splits.items()}
        self._files.close()
        summary = ShardSummary(
            first=self.first,
            next=next_position,
            is_last=is_last,
            skipped=dict(sorted(self._skipped.items())),
            splits=splits,
        )
        write_json(self._partial / SHARD_FILE, summary)
        replace(self._partial, self._folder)
        return summary


class _SplitWriter:
    """Write one split of a shard."""

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
    """Write a file and compute its SHA-256."""

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        self._file: IO[bytes] = files.enter_context(path.open("wb"))
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_manifest(
    folder: Path, num_shards: int, settings: dict[str, Any], sources: dict[str, SourceFile]
) -> Manifest:
    """Write the indices, then the manifest, which marks the folder complete.

    Args:
        folder: The prepared folder.
        num_shards: Number of its shards.
        settings: The settings in prepare.json.
        sources: Hashes of the local files that were read, by path.

    Raises:
        UserError: A shard.json cannot be read.
    """
    shards = [read_shard(folder, number) for number in range(num_shards)]
    splits: dict[ShardSplit, SplitSummary] = {}
    for split in SPLITS:
        path = index_file(folder, split)
        start = 0
        with replacing(path) as temporary, temporary.open("wb") as file:
            for number in range(num_shards):
                documents = np.fromfile(shard_folder(folder, number) / f"{split}.documents", dtype=DOCUMENT)
                file.write(index_records(documents, start).tobytes())
                start += int(documents["length"].sum(dtype=np.uint64))
            file.write(np.array((start, 0), dtype=INDEX).tobytes())
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
        sources=sources,
    )
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def index_records(documents: np.ndarray, start: int) -> np.ndarray:
    """Return the index records of a shard's documents.

    Args:
        documents: Lengths and checksums, `[n]` of dtype `DOCUMENT`.
        start: Number of tokens in the preceding shards.

    Returns:
        Starts and checksums, `[n]` of dtype `INDEX`.
    """
    records = np.empty(len(documents), dtype=INDEX)
    ends = np.cumsum(documents["length"], dtype=np.uint64)
    records["start"] = start + ends - documents["length"]
    records["crc32"] = documents["crc32"]
    return records
