"""Verify a folder of shards against its hashes and counts, and count its documents by length."""

import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.fingerprint import describe_changes
from data.shards.encode import num_cores
from data.shards.writer import index_records
from data.sources.shard_format import (
    DOCUMENT,
    INDEX,
    MANIFEST_FILE,
    SETTINGS_FILE,
    SPLITS,
    TOKEN,
    Manifest,
    ShardSplit,
    SplitSummary,
    file_sha256,
    index_file,
    read_json,
    read_manifest,
    read_shard,
    shard_folder,
)
from data.sources.shards import SplitReader
from errors import UserError

_CHUNK_DOCUMENTS = 1 << 20


def verify(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Read all files of a folder and yield their problems.

    Checks every file's SHA-256, each document's CRC-32 and last token, that every id is in the vocabulary,
    the counts, that each shard starts where the previous one ends, the indices, and that prepare.json has the
    manifest's settings.

    Args:
        folder: The prepared folder.

    Yields:
        A checked path (a shard's folder, an index, prepare.json or the manifest), to be deleted if it is
        damaged, and the list of its problems.

    Raises:
        UserError: The manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    numbers = range(len(manifest.shards))
    # hashing releases the GIL, so that threads run in parallel
    with ThreadPoolExecutor(num_cores()) as pool:
        for number, problems in enumerate(
            pool.map(lambda number: _check_shard(folder, manifest, number), numbers)
        ):
            yield shard_folder(folder, number), problems
    settings_problems = _check_settings(folder, manifest)
    yield folder / SETTINGS_FILE, settings_problems
    yield folder / MANIFEST_FILE, [*settings_problems, *_check_order(folder, manifest)]
    for split in SPLITS:
        yield index_file(folder, split), _check_index(folder, manifest, split)


def length_histogram(folder: Path, split: ShardSplit) -> list[tuple[int, int, int]]:
    """Count documents by length.

    Args:
        folder: The prepared folder.
        split: Split of the documents to count.

    Returns:
        For each power of two p that occurs: p, the number of documents of p to 2p - 1 tokens, and the number
        of their tokens.

    Raises:
        UserError: The manifest or the index is missing or damaged.
    """
    reader = SplitReader(folder, split)
    documents = np.zeros(64, dtype=np.int64)
    tokens = np.zeros(64, dtype=np.int64)
    for first in range(0, reader.num_documents, _CHUNK_DOCUMENTS):
        numbers = np.arange(first, min(first + _CHUNK_DOCUMENTS, reader.num_documents))
        lengths = reader.lengths(numbers)
        bins = np.log2(lengths).astype(np.int64)
        documents += np.bincount(bins, minlength=64)
        tokens += np.bincount(bins, weights=lengths, minlength=64).astype(np.int64)
    powers = np.flatnonzero(documents).tolist()
    return [(1 << power, int(documents[power]), int(tokens[power])) for power in powers]


def _check_shard(folder: Path, manifest: Manifest, number: int) -> list[str]:
    problems: list[str] = []
    tokenizer = manifest.settings["tokenizer"]
    try:
        if read_shard(folder, number).splits != manifest.shards[number]:
            problems.append(f"{shard_folder(folder, number)}: shard.json does not match the manifest")
        for split, summary in manifest.shards[number].items():
            stem = shard_folder(folder, number) / split
            problems += _check_split(
                stem, summary, int(tokenizer["vocab_size"]), int(tokenizer["end_of_document_id"])
            )
    except (OSError, ValueError) as error:
        problems.append(str(error))
    return problems


def _check_split(stem: Path, summary: SplitSummary, vocab_size: int, end_of_document_id: int) -> list[str]:
    for suffix, digest in summary.sha256.items():
        path = stem.with_name(f"{stem.name}.{suffix}")
        if file_sha256(path) != digest:
            return [f"{path}: its SHA-256 does not match"]
    tokens_file, documents_file = (stem.with_name(f"{stem.name}.{each}") for each in ("tokens", "documents"))
    documents = np.fromfile(documents_file, dtype=DOCUMENT)
    tokens = _map(tokens_file, TOKEN)
    ends = np.cumsum(documents["length"], dtype=np.int64)
    if len(documents) != summary.documents or len(tokens) != summary.tokens:
        return [f"{stem}: {len(documents)} documents, {len(tokens)} tokens: the counts do not match"]
    if len(tokens) != (ends[-1] if len(ends) else 0):
        return [f"{documents_file}: the lengths do not add up to {len(tokens)} tokens"]
    if len(tokens) and (int(tokens.max()) >= vocab_size or (tokens[ends - 1] != end_of_document_id).any()):
        return [f"{tokens_file}: an id is not in the vocabulary, or a document has no end-of-document token"]
    bounds = pairwise([0, *ends.tolist()])
    if any(
        zlib.crc32(tokens[first:last].tobytes()) != crc32
        for (first, last), crc32 in zip(bounds, documents["crc32"].tolist(), strict=True)
    ):
        return [f"{tokens_file}: a document's checksum does not match"]
    return []


def _check_settings(folder: Path, manifest: Manifest) -> list[str]:
    path = folder / SETTINGS_FILE
    try:
        settings = read_json(path)
    except UserError as error:
        return [str(error)]
    if settings == manifest.settings:
        return []
    differing = describe_changes(settings, manifest.settings) or ["a key has another name"]
    return [f"{path} and {MANIFEST_FILE} have other settings: {'; '.join(differing)}"]


def _check_order(folder: Path, manifest: Manifest) -> list[str]:
    try:
        shards = [read_shard(folder, number) for number in range(len(manifest.shards))]
    except UserError:
        return ["a shard cannot be read"]
    problems = [
        f"{shard_folder(folder, number)}: does not start where the previous shard ends"
        for number, (previous, shard) in enumerate(pairwise(shards), 1)
        if previous.next != shard.first or previous.is_last
    ]
    if shards[0].first is not None or not shards[-1].is_last:
        problems.append(f"{folder}: the shards do not span the source from start to end")
    skipped = sum((Counter(shard.skipped) for shard in shards), Counter[str]())
    if skipped != Counter(manifest.skipped):
        problems.append(f"{folder}: the manifest's counts of skipped rows do not match the shards")
    for split, summary in manifest.splits.items():
        num_documents = sum(shard.splits[split].documents for shard in shards)
        num_tokens = sum(shard.splits[split].tokens for shard in shards)
        if (num_documents, num_tokens) != (summary.documents, summary.tokens):
            problems.append(f"{folder}: the manifest's counts of {split} do not match the shards")
    return problems


def _check_index(folder: Path, manifest: Manifest, split: ShardSplit) -> list[str]:
    path = index_file(folder, split)
    try:
        if file_sha256(path) != manifest.splits[split].sha256["index"]:
            return [f"{path}: its SHA-256 does not match"]
        index = _map(path, INDEX)
        first = start = 0
        for number in range(len(manifest.shards)):
            documents = np.fromfile(shard_folder(folder, number) / f"{split}.documents", dtype=DOCUMENT)
            if not np.array_equal(index[first : first + len(documents)], index_records(documents, start)):
                return [f"{path}: does not match {shard_folder(folder, number)}"]
            first, start = first + len(documents), start + int(documents["length"].sum(dtype=np.uint64))
        if index[first:].tolist() != [(start, 0)]:
            return [f"{path}: does not end with the sentinel after the last document"]
    except (OSError, ValueError) as error:
        return [f"{path}: {error}"]
    return []


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
