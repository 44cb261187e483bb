"""Whether a folder of shards is what was written, and what is in it."""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.shards.encode import num_cores
from data.shards.writer import index_records
from data.sources.shard_format import (
    DOCUMENT,
    INDEX,
    MANIFEST_FILE,
    SPLITS,
    TOKEN,
    Manifest,
    ShardSplit,
    SplitSummary,
    file_sha256,
    index_file,
    read_manifest,
    read_shard,
    shard_folder,
)

_DOCUMENTS_AT_ONCE = 1 << 20


def verify(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Read everything and compare it with what was written.

    Checked are every file's SHA-256, each document's CRC-32 and last token, every id against the vocabulary,
    the counts, that each shard begins where the one before it ends, and the indices.

    Args:
        folder: The folder that was prepared.

    Yields:
        What was checked, which is what to delete if it is damaged (a shard's folder, an index, the
        manifest), and what is wrong with it, as it goes.

    Raises:
        ValueError: If there is no manifest that can be read.
    """
    manifest = read_manifest(folder)
    numbers = range(len(manifest.shards))
    # Hashing leaves the interpreter's lock alone, so that threads are enough.
    with ThreadPoolExecutor(num_cores()) as pool:
        for number, problems in enumerate(
            pool.map(lambda number: _check_shard(folder, manifest, number), numbers)
        ):
            yield shard_folder(folder, number), problems
    yield folder / MANIFEST_FILE, _check_order(folder, manifest)
    for split in SPLITS:
        yield index_file(folder, split), _check_index(folder, manifest, split)


def length_histogram(folder: Path, split: ShardSplit) -> list[tuple[int, int, int]]:
    """Count documents by length.

    Args:
        folder: The folder that was prepared.
        split: Which of its documents.

    Returns:
        For each power of two: itself, the number of documents that have as many tokens or more but less than
        twice as many, and the number of their tokens.
    """
    summary = read_manifest(folder).splits[split]
    documents = np.zeros(64, dtype=np.int64)
    tokens = np.zeros(64, dtype=np.int64)
    index = _map(index_file(folder, split), INDEX)
    for first in range(0, summary.documents, _DOCUMENTS_AT_ONCE):
        starts = index["start"][first : min(first + _DOCUMENTS_AT_ONCE, summary.documents) + 1]
        lengths = np.diff(starts).astype(np.int64)
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
            problems.append(f"{shard_folder(folder, number)}: shard.json is not what the manifest says")
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
            return [f"{path}: its SHA-256 is not what was written"]
    tokens_file, documents_file = (stem.with_name(f"{stem.name}.{each}") for each in ("tokens", "documents"))
    documents = np.fromfile(documents_file, dtype=DOCUMENT)
    tokens = _map(tokens_file, TOKEN)
    ends = np.cumsum(documents["length"], dtype=np.int64)
    if len(documents) != summary.documents or len(tokens) != summary.tokens:
        return [f"{stem}: {len(documents)} documents of {len(tokens)} tokens are not as many as were counted"]
    if len(tokens) != (ends[-1] if len(ends) else 0):
        return [f"{documents_file}: the lengths do not add up to the {len(tokens)} tokens there are"]
    if len(tokens) and (int(tokens.max()) >= vocab_size or (tokens[ends - 1] != end_of_document_id).any()):
        return [f"{tokens_file}: an id is not in the vocabulary, or a document does not end as it should"]
    bounds = pairwise([0, *ends.tolist()])
    if any(
        zlib.crc32(tokens[first:last].tobytes()) != crc32
        for (first, last), crc32 in zip(bounds, documents["crc32"].tolist(), strict=True)
    ):
        return [f"{tokens_file}: a document's checksum is another one"]
    return []


def _check_order(folder: Path, manifest: Manifest) -> list[str]:
    try:
        shards = [read_shard(folder, number) for number in range(len(manifest.shards))]
    except ValueError:
        return ["a shard cannot be read"]
    problems = [
        f"{shard_folder(folder, number)}: does not begin where the shard before it ends"
        for number, (before, shard) in enumerate(pairwise(shards), 1)
        if before.next != shard.first or before.is_last
    ]
    if shards[0].first is not None or not shards[-1].is_last:
        problems.append(f"{folder}: the shards do not reach from the beginning of the source to the end")
    for split, summary in manifest.splits.items():
        counts = [sum(getattr(shard.splits[split], of) for shard in shards) for of in ("documents", "tokens")]
        if counts != [summary.documents, summary.tokens]:
            problems.append(f"{folder}: the manifest's counts of {split} are not those of the shards")
    return problems


def _check_index(folder: Path, manifest: Manifest, split: ShardSplit) -> list[str]:
    path = index_file(folder, split)
    try:
        if file_sha256(path) != manifest.splits[split].sha256["index"]:
            return [f"{path}: its SHA-256 is not what was written"]
        index = _map(path, INDEX)
        first = start = 0
        for number in range(len(manifest.shards)):
            documents = np.fromfile(shard_folder(folder, number) / f"{split}.documents", dtype=DOCUMENT)
            if not np.array_equal(index[first : first + len(documents)], index_records(documents, start)):
                return [f"{path}: is not what {shard_folder(folder, number)} holds"]
            first, start = first + len(documents), start + int(documents["length"].sum(dtype=np.uint64))
        if index[first:].tolist() != [(start, 0)]:
            return [f"{path}: does not end with the last document"]
    except (OSError, ValueError) as error:
        return [f"{path}: {error}"]
    return []


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
