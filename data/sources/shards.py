"""The "shards" source: prepared token shards, in stored or shuffled order, with tokens read lazily.

With a seed, each epoch is another random permutation of all documents of all shards, in constant memory
(data/permutation.py). A position is an epoch and a place in its order. Lengths come from a memory-mapped
index; a document's tokens are read, and checked against their CRC-32, on first access.
"""

import bisect
import logging
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from data.config import ShardsSource, Split
from data.fingerprint import join_parts
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
from data.tokenizer_content import describe_other_tokenizer, is_older_fingerprint, same_tokenizer
from errors import UserError

logger = logging.getLogger(__name__)

_CHUNK_DOCUMENTS = 1024
_OPEN_FILES = 64


class LazyTokens:
    """Tokens of a stored document, read on first access.

    Args:
        shards: Reads the tokens.
        start: Index of the first token among the tokens of all shards.
        length: Number of tokens.
        crc32: Checksum of the tokens' bytes.
    """

    __slots__ = ("_crc32", "_length", "_shards", "_start", "_tokens")

    def __init__(self, shards: "SplitReader", start: int, length: int, crc32: int) -> None:
        self._shards, self._start, self._length, self._crc32 = shards, start, length, crc32
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._length

    def __getitem__(self, which: slice, /) -> np.ndarray:
        """Return consecutive tokens, uint32 `[n]`.

        Raises:
            UserError: The stored document is damaged; names the file.
        """
        if self._tokens is None:
            self._tokens = self._shards.read(self._start, self._length, self._crc32)
        return self._tokens[which]


class SplitReader:
    """Random access to the documents of one split of a folder of shards.

    Args:
        folder: The prepared folder.
        split: The split to read.

    Attributes:
        num_documents: Number of documents in the split.
        num_tokens: Number of their tokens.

    Raises:
        UserError: The folder is incomplete.
    """

    def __init__(self, folder: Path, split: ShardSplit) -> None:
        manifest = read_manifest(folder)
        self.num_documents = manifest.splits[split].documents
        self.num_tokens = manifest.splits[split].tokens
        self._files = [
            shard_folder(folder, number) / f"{split}.tokens" for number in range(len(manifest.shards))
        ]
        # index of each shard's first token, then the total number of tokens
        self._firsts = [0, *accumulate(shard[split].tokens for shard in manifest.shards)]
        self._index_path = index_file(folder, split)
        self._index = _map_index(self._index_path, self.num_documents)
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def check_sizes(self) -> None:
        """Check that every shard exists and has the expected size.

        Raises:
            UserError: A shard does not; names its file.
        """
        for path, first, stop in zip(self._files, self._firsts, self._firsts[1:], strict=False):
            size = path.stat().st_size if path.exists() else None
            if size != (stop - first) * TOKEN.itemsize:
                raise UserError(
                    f"{path} has {size} bytes, should have {(stop - first) * TOKEN.itemsize}: {_remedy(path)}"
                )

    def document(self, number: int) -> LazyTokens:
        """Look a document up in the index, without reading its tokens.

        Args:
            number: The document's number in stored order, from 0.

        Raises:
            UserError: The index is damaged; names it.
        """
        (start, crc32), (stop, _) = self._index[number : number + 2].tolist()
        if not start < stop <= self._firsts[-1]:
            raise UserError(
                f"{self._index_path} is damaged: document {number} has tokens {start} to {stop - 1} of "
                f"{self._firsts[-1]}; {_remedy(self._index_path)}"
            )
        return LazyTokens(self, start, stop - start, crc32)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Look up the lengths of documents in tokens, int64 `[n]`.

        Args:
            numbers: The documents' numbers in stored order, int64 `[n]`.

        Raises:
            UserError: The index is damaged; names it.
        """
        starts, stops = self._index["start"][numbers], self._index["start"][numbers + 1]
        is_damaged = (stops <= starts) | (stops > self._firsts[-1])
        if is_damaged.any():
            self.document(int(numbers[is_damaged][0]))  # raises
        return (stops - starts).astype(np.int64)

    def read(self, start: int, length: int, crc32: int) -> np.ndarray:
        """Read a document's tokens and verify their checksum.

        Args:
            start: Index of the first token among the tokens of all shards.
            length: Number of tokens.
            crc32: Expected checksum of the bytes.

        Returns:
            The tokens, uint32 `[length]`.

        Raises:
            UserError: The bytes are damaged; names the file.
        """
        shard = bisect.bisect_right(self._firsts, start) - 1
        path, first = self._files[shard], start - self._firsts[shard]
        try:
            data = os.pread(self._open(shard), length * TOKEN.itemsize, first * TOKEN.itemsize)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error}): {_remedy(path)}") from error
        if len(data) != length * TOKEN.itemsize or zlib.crc32(data) != crc32:
            raise UserError(
                f"{path} is damaged in tokens {first} to {first + length - 1}: {_remedy(path)}, or set "
                'on_damaged_file to "skip"'
            )
        return np.frombuffer(data, dtype=TOKEN)

    def _open(self, shard: int) -> int:
        """Return a descriptor of a shard's tokens; the most recently used ones stay open."""
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self._files[shard], os.O_RDONLY)
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentChunk:
    """Numbers of consecutive documents of an epoch.

    Attributes:
        epoch: Epoch, from 0.
        place: Place of the first document in the epoch's order.
        numbers: Numbers of the documents in stored order, int64 `[n]`.
        is_damaged: Whether each document is damaged and skipped, bool `[n]`.
    """

    epoch: int
    place: int
    numbers: np.ndarray
    is_damaged: np.ndarray


class ShardDocuments:
    """Documents of a folder of shards, each once per epoch, in stored or shuffled order.

    Args:
        source: The folder, and what to do about damage.
        tokenizer_fingerprint: Fingerprint of the run's tokenizer.
        split: Documents to keep.
        shuffle_seed: Seed of the shuffle; None for the stored order.
        log_skipped: Whether this process logs skipped documents.

    Raises:
        UserError: The folder is incomplete, was tokenized by another tokenizer, has no document of the split,
            or lacks a file while on_damaged_file is "stop".
    """

    def __init__(
        self,
        source: ShardsSource,
        *,
        tokenizer_fingerprint: str,
        split: Split,
        shuffle_seed: int | None = None,
        log_skipped: bool = True,
    ) -> None:
        self._folder = Path(source.folder)
        settings = read_manifest(self._folder).settings
        fingerprint = settings["tokenizer"]["fingerprint"]
        if not same_tokenizer(fingerprint, tokenizer_fingerprint):
            reason = describe_other_tokenizer(fingerprint, tokenizer_fingerprint)
            raise UserError(
                f"{self._folder} was prepared with tokenizer {settings['tokenizer']['name']} (fingerprint "
                f"{fingerprint}), but this run's has fingerprint {tokenizer_fingerprint}: {reason}; set "
                "data.tokenizer to that one, or prepare the shards again"
            )
        if is_older_fingerprint(fingerprint) and log_skipped:
            logger.warning(
                "%s was prepared by an earlier version: only the vocabulary of its tokenizer was compared, "
                "and text that spells an added token has its id there; prepare the shards again to be sure",
                self._folder,
            )
        self._splits: list[ShardSplit] = [each for each in SPLITS if split in ("all", each)]
        self._readers = [SplitReader(self._folder, each) for each in self._splits]
        self._num_documents = sum(reader.num_documents for reader in self._readers)
        if not self._num_documents:
            raise UserError(f"{self._folder} holds no document of {' or '.join(self._splits)}: prepare more")
        self._skip_damaged = source.on_damaged_file == "skip"
        if not self._skip_damaged:
            for reader in self._readers:
                reader.check_sizes()
        self._shuffle_seed = shuffle_seed
        self._log_skipped = log_skipped

    def __str__(self) -> str:
        return f"{' and '.join(self._splits)} of {self._folder}"

    @property
    def fingerprint(self) -> str:
        """Hashes of the splits' indices, which have a checksum of each document, and the order."""
        splits = read_manifest(self._folder).splits
        hashes = {split: splits[split].sha256["index"][:16] for split in self._splits}
        return join_parts({**hashes, "shuffle_seed": self._shuffle_seed})

    @property
    def num_documents(self) -> int:
        """Documents per epoch."""
        return self._num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens per epoch."""
        return sum(reader.num_tokens for reader in self._readers)

    def read(self, position: Position | None = None, *, repeat: bool) -> Iterator[Row]:
        """Yield documents in order from a position.

        Args:
            position: A row's `next_position`; None for the start.
            repeat: Whether to start another epoch at the end of each.

        Raises:
            UserError: Every document of an epoch is damaged.
        """
        for chunk in self.chunks(position, repeat=repeat):
            numbers, damaged = chunk.numbers.tolist(), chunk.is_damaged.tolist()
            for next_place, (number, is_damaged) in enumerate(
                zip(numbers, damaged, strict=True), chunk.place + 1
            ):
                yield Row(
                    {"epoch": chunk.epoch, "place": next_place},
                    tokens=None if is_damaged else self.tokens(number),
                    skipped="damaged_document" if is_damaged else None,
                )

    def progress(self, position: Position | None) -> float:
        """Return the fraction of the documents of the first epoch that precede a position."""
        return 0.0 if position is None else position["epoch"] or position["place"] / self._num_documents

    def chunks(self, position: Position | None = None, *, repeat: bool) -> Iterator[DocumentChunk]:
        """Yield the documents' numbers in order from a position, as `read` yields documents.

        Args:
            position: A row's `next_position`; None for the start.
            repeat: Whether to start another epoch at the end of each.

        Raises:
            UserError: Every document of an epoch is damaged.
        """
        start = position or {"epoch": 0, "place": 0}
        epoch, place = start["epoch"], start["place"]
        while True:
            num_read = num_damaged = 0
            is_whole_epoch = place == 0
            for first in range(place, self._num_documents, _CHUNK_DOCUMENTS):
                places = np.arange(first, min(first + _CHUNK_DOCUMENTS, self._num_documents))
                numbers = self._shuffled(epoch, places).astype(np.int64)
                errors = self._errors(numbers)
                if errors and not num_damaged and self._log_skipped:
                    logger.warning(
                        "skipped the first damaged document of epoch %d: %s", epoch, min(errors.items())[1]
                    )
                num_read, num_damaged = num_read + len(numbers), num_damaged + len(errors)
                is_damaged = np.isin(np.arange(len(numbers)), [*errors])
                yield DocumentChunk(epoch=epoch, place=first, numbers=numbers, is_damaged=is_damaged)
            num_good = num_read - num_damaged
            if num_damaged and self._log_skipped:
                text = "epoch %d of %s: %d documents, %d damaged ones skipped"
                logger.warning(text, epoch, self, num_good, num_damaged)
            if is_whole_epoch and not num_good:
                raise UserError(f"{self} holds only damaged documents: prepare the shards again")
            if not repeat:
                return
            epoch, place = epoch + 1, 0

    def tokens(self, number: int) -> LazyTokens:
        """Look a document up, without reading its tokens.

        Args:
            number: The document's number in stored order, from 0.
        """
        for reader in self._readers:
            if number < reader.num_documents:
                break
            number -= reader.num_documents
        return reader.document(number)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Look up the lengths of documents in tokens, int64 `[n]`.

        Args:
            numbers: Numbers of documents in stored order, int64 `[n]`.
        """
        lengths = np.empty(len(numbers), dtype=np.int64)
        first = 0
        for reader in self._readers:
            which = (numbers >= first) & (numbers < first + reader.num_documents)
            lengths[which] = reader.lengths(numbers[which] - first)
            first += reader.num_documents
        return lengths

    def _shuffled(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Map places in the epoch's order to document numbers."""
        if self._shuffle_seed is None:
            return places
        return Permutation(self._num_documents, self._shuffle_seed, "documents", epoch)(places)

    def _errors(self, numbers: np.ndarray) -> dict[int, UserError]:
        """Return the errors of damaged documents by their index, if damaged documents are skipped."""
        errors: dict[int, UserError] = {}
        if self._skip_damaged:
            # every rank must read every document, since a skipped one shifts all that follow
            for index, number in enumerate(numbers.tolist()):
                try:
                    _ = self.tokens(number)[:]
                except UserError as error:
                    errors[index] = error
        return errors


def _map_index(path: Path, num_documents: int) -> np.ndarray:
    size = (num_documents + 1) * INDEX.itemsize
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): {_remedy(path)}") from error
    if len(mapped) != size:
        raise UserError(f"{path} has {len(mapped)} bytes, should have {size}: {_remedy(path)}")
    return np.frombuffer(mapped, dtype=INDEX)


def _remedy(path: Path) -> str:
    what = path if path.suffix == ".index" else path.parent
    return f"delete {what} and run the same `python -m data.shards prepare` again, which rewrites it"
