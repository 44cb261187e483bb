"""Prepared shards as a source of documents: an order drawn by a permutation, and tokens read when looked at.

With a seed each pass goes through all documents of all shards in another random order, which takes no memory
(data/permutation.py). A position is a pass and a place in its order. Lengths come from one memory-mapped
index; the tokens of a document are read, and checked against its CRC-32, by whoever looks at them.
"""

import bisect
import hashlib
import json
import logging
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from data.config import ShardsSource, Split
from data.permutation import Permutation
from data.sources.base import Position, Row
from data.sources.shard_format import (
    INDEX,
    SPLITS,
    TOKEN,
    ShardSplit,
    index_file,
    read_manifest,
    shard_folder,
)

logger = logging.getLogger(__name__)

_PLACES_AT_ONCE = 1024
_OPEN_FILES = 64


class StoredTokens:
    """The tokens of a stored document, read the first time that they are looked at."""

    __slots__ = ("_crc32", "_length", "_shards", "_start", "_tokens")

    def __init__(self, shards: "SplitReader", start: int, length: int, crc32: int) -> None:
        """Say where the document lies.

        Args:
            shards: Reads it.
            start: Its first token, counted over all shards.
            length: Its number of tokens.
            crc32: The checksum of its bytes.
        """
        self._shards, self._start, self._length, self._crc32 = shards, start, length, crc32
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._length

    def __getitem__(self, which: slice, /) -> np.ndarray:
        """Return consecutive tokens, uint32 `[n]`.

        Raises:
            ValueError: If the document is not what was written; names the file.
        """
        if self._tokens is None:
            self._tokens = self._shards.read(self._start, self._length, self._crc32)
        return self._tokens[which]


class SplitReader:
    """Reads the documents of one split of a folder of shards."""

    def __init__(self, folder: Path, split: ShardSplit) -> None:
        """Map the index.

        Args:
            folder: The folder that was prepared.
            split: Which of its documents.

        Raises:
            ValueError: If the folder is not whole.
        """
        manifest = read_manifest(folder)
        self.num_documents = manifest.splits[split].documents
        self._files = [
            shard_folder(folder, number) / f"{split}.tokens" for number in range(len(manifest.shards))
        ]
        # First token of each shard, and the number of all tokens.
        self._firsts = [0, *accumulate(shard[split].tokens for shard in manifest.shards)]
        self._index = _map_index(index_file(folder, split), self.num_documents)
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __del__(self) -> None:
        """Close the files."""
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def check_sizes(self) -> None:
        """Look whether every shard is there and as long as it should be.

        Raises:
            ValueError: If one is not; names it.
        """
        for path, first, last in zip(self._files, self._firsts, self._firsts[1:], strict=False):
            size = path.stat().st_size if path.exists() else None
            if size != (last - first) * TOKEN.itemsize:
                raise ValueError(
                    f"{path} has {size} bytes, should have {(last - first) * TOKEN.itemsize}: {_remedy(path)}"
                )

    def document(self, number: int) -> StoredTokens:
        """Find a document; nothing but the index is read.

        Args:
            number: Of the document, from 0, in the order in which it was written.
        """
        (start, crc32), (last, _) = self._index[number : number + 2].tolist()
        return StoredTokens(self, start, last - start, crc32)

    def read(self, start: int, length: int, crc32: int) -> np.ndarray:
        """Read a document.

        Args:
            start: Its first token, counted over all shards.
            length: Its number of tokens.
            crc32: The checksum that its bytes should have.

        Returns:
            Its tokens, uint32 `[length]`.

        Raises:
            ValueError: If the bytes there are others; names the file.
        """
        shard = bisect.bisect_right(self._firsts, start) - 1
        path, first = self._files[shard], start - self._firsts[shard]
        try:
            data = os.pread(self._open(shard), length * TOKEN.itemsize, first * TOKEN.itemsize)
        except OSError as error:
            raise ValueError(f"cannot read {path} ({error}): {_remedy(path)}") from error
        if len(data) != length * TOKEN.itemsize or zlib.crc32(data) != crc32:
            raise ValueError(
                f"{path} is damaged in the {length} tokens from {first} on: {_remedy(path)}, or set "
                'on_damaged_file to "skip"'
            )
        return np.frombuffer(data, dtype=TOKEN)

    def _open(self, shard: int) -> int:
        """Return a descriptor of a shard's tokens, keeping the last ones used open."""
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self._files[shard], os.O_RDONLY)
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


class ShardDocuments:
    """The documents of a folder of shards, each once in a pass, in the order written or in a random one."""

    def __init__(
        self,
        source: ShardsSource,
        *,
        tokenizer_fingerprint: str,
        split: Split,
        shuffle_seed: int | None = None,
        is_reporter: bool = True,
    ) -> None:
        """Open the folder.

        Args:
            source: Which one, and what to do about damage.
            tokenizer_fingerprint: The run's tokenizer.
            split: Which documents.
            shuffle_seed: Seed of the order; None for the order in which they were written.
            is_reporter: Whether this process logs what was skipped.

        Raises:
            ValueError: If the folder is not whole, was tokenized by another tokenizer, has no such document,
                or lacks a file where damage is to stop the run.
        """
        self._folder = Path(source.folder)
        settings = read_manifest(self._folder).settings
        fingerprint = settings["tokenizer"]["fingerprint"]
        if fingerprint != tokenizer_fingerprint:
            raise ValueError(
                f"{self._folder} was prepared with tokenizer {settings['tokenizer']['name']} (fingerprint "
                f"{fingerprint}), but this run's has fingerprint {tokenizer_fingerprint}: set data.tokenizer "
                "to that one, or prepare the shards again"
            )
        self._splits: list[ShardSplit] = [each for each in SPLITS if split in ("all", each)]
        self._readers = [SplitReader(self._folder, each) for each in self._splits]
        self._num_documents = sum(reader.num_documents for reader in self._readers)
        if not self._num_documents:
            raise ValueError(f"{self._folder} holds no document of {' or '.join(self._splits)}: prepare more")
        self._is_tolerant = source.on_damaged_file == "skip"
        if not self._is_tolerant:
            for reader in self._readers:
                reader.check_sizes()
        self._shuffle_seed = shuffle_seed
        self._is_reporter = is_reporter

    def __str__(self) -> str:
        """Name the folder."""
        return f"{' and '.join(self._splits)} of {self._folder}"

    @property
    def fingerprint(self) -> str:
        """A short hash of what the shards hold, the splits and the order."""
        manifest = read_manifest(self._folder)
        hashes = [manifest.splits[split].sha256 for split in self._splits]
        parts = [self._splits, hashes, self._shuffle_seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield every document from a position on.

        Args:
            position: `after` of the row before the first; None for the start.
            repeat: Whether to begin another pass at the end of each.

        Raises:
            ValueError: If every document of a pass is damaged.
        """
        start = position or {"epoch": 0, "place": 0}
        epoch, place = start["epoch"], start["place"]
        while True:
            num_good = num_bad = 0
            is_whole = place == 0
            for first in range(place, self._num_documents, _PLACES_AT_ONCE):
                places = np.arange(first, min(first + _PLACES_AT_ONCE, self._num_documents))
                for after, number in enumerate(self._in_order(epoch, places).tolist(), first + 1):
                    tokens, error = self._tokens(number)
                    num_good += error is None
                    num_bad += error is not None
                    if error is not None and num_bad == 1 and self._is_reporter:
                        logger.warning("skipped the first damaged document of epoch %d: %s", epoch, error)
                    skipped = None if error is None else "damaged_document"
                    yield Row({"epoch": epoch, "place": after}, tokens=tokens, skipped=skipped)
            if num_bad and self._is_reporter:
                logger.warning(
                    "epoch %d of %s: %d documents, %d damaged ones skipped", epoch, self, num_good, num_bad
                )
            if is_whole and not num_good:
                raise ValueError(f"{self} holds no document that is whole: prepare the shards again")
            if not repeat:
                return
            epoch, place = epoch + 1, 0

    def _in_order(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self._shuffle_seed is None:
            return places
        return Permutation(self._num_documents, self._shuffle_seed, "documents", epoch)(places)

    def _tokens(self, number: int) -> tuple[StoredTokens | None, ValueError | None]:
        for reader in self._readers:
            if number < reader.num_documents:
                break
            number -= reader.num_documents
        tokens = reader.document(number)
        if self._is_tolerant:
            # Every rank must know of it, since a document that is left out moves all that follow.
            try:
                _ = tokens[:]
            except ValueError as error:
                return None, error
        return tokens, None


def _map_index(path: Path, num_documents: int) -> np.ndarray:
    size = (num_documents + 1) * INDEX.itemsize
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): {_remedy(path)}") from error
    if len(mapped) != size:
        raise ValueError(f"{path} has {len(mapped)} bytes, should have {size}: {_remedy(path)}")
    return np.frombuffer(mapped, dtype=INDEX)


def _remedy(path: Path) -> str:
    what = path if path.suffix == ".index" else path.parent
    return f"delete {what} and run the same `python -m data.shards prepare` again, which writes it anew"
