"""The files of a folder of prepared shards.

    prepare.json                      settings; written first, later runs must have the same
    shards/00000/train.tokens         token ids, uint32 little-endian, documents concatenated
    shards/00000/train.documents      length in tokens and CRC-32 of each document
    shards/00000/held_out.*           the documents that data/sources/split.py holds out from training
    shards/00000/shard.json           counts, hashes, and the shard's first and next position in the source
    train.index, held_out.index       each document's first token, counted over all shards, and its CRC-32
    manifest.json                     settings, counts, and hashes, also of the local files that were read;
                                      written last: a folder with it is complete

A shard's folder appears complete or not at all, so that a killed preparation loses no finished shard and
writes nothing twice.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeAlias

import numpy as np

from disk import write_text
from errors import UserError

FORMAT = 1
SETTINGS_FILE = "prepare.json"
MANIFEST_FILE = "manifest.json"
SHARD_FILE = "shard.json"
SHARDS_FOLDER = "shards"
PARTIAL = ".partial"

ShardSplit: TypeAlias = Literal["train", "held_out"]
SPLITS: tuple[ShardSplit, ...] = ("train", "held_out")

TOKEN = np.dtype("<u4")
DOCUMENT = np.dtype([("length", "<u4"), ("crc32", "<u4")])
# one record per document, and a sentinel whose start is the total number of tokens
INDEX = np.dtype([("start", "<u8"), ("crc32", "<u4")])


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """Counts and hashes of one split of a shard or of the whole folder.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens, end-of-document tokens included.
        sha256: SHA-256 of each file, by its suffix.
    """

    documents: int
    tokens: int
    sha256: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """Content of shard.json.

    Attributes:
        first: Position in the source of the shard's first row; None for the start.
        next: Position after its last row.
        is_last: Whether this is the last shard.
        skipped: Number of skipped rows, by reason.
        splits: Counts and hashes.
    """

    first: dict[str, Any] | None
    next: dict[str, Any] | None
    is_last: bool
    skipped: dict[str, int]
    splits: dict[ShardSplit, SplitSummary]

    @property
    def num_tokens(self) -> int:
        """Tokens of all splits."""
        return sum(split.tokens for split in self.splits.values())

    @property
    def num_documents(self) -> int:
        """Documents of all splits."""
        return sum(split.documents for split in self.splits.values())


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """Hashes of a local file that shards were made from.

    Attributes:
        num_bytes: Size of the file.
        sha256: SHA-256 of the whole file.
        content: The hash of data/sources/content.py, by which a run recognizes the file.
    """

    num_bytes: int
    sha256: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of manifest.json.

    Attributes:
        settings: The settings in prepare.json.
        skipped: Number of skipped rows, by reason.
        splits: Counts and hashes of the whole folder.
        shards: Counts and hashes of each shard's splits, in order.
        sources: The local files that were read, by path; none in folders of earlier versions.
    """

    settings: dict[str, Any]
    skipped: dict[str, int]
    splits: dict[ShardSplit, SplitSummary]
    shards: list[dict[ShardSplit, SplitSummary]]
    sources: dict[str, SourceFile]


def shard_folder(folder: Path, number: int) -> Path:
    """Return the folder of a shard.

    Args:
        folder: The prepared folder.
        number: The shard's number, from 0.
    """
    return folder / SHARDS_FOLDER / f"{number:05}"


def index_file(folder: Path, split: ShardSplit) -> Path:
    """Return the index file of a split."""
    return folder / f"{split}.index"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete folder.

    Args:
        folder: The prepared folder.

    Raises:
        UserError: The manifest is missing, damaged or of another format.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        is_partial = (folder / SETTINGS_FILE).exists()
        remedy = (
            "run the same `python -m data.shards prepare` again to resume it"
            if is_partial
            else "correct the folder, or make them with `python -m data.shards prepare` (docs/data.md)"
        )
        raise UserError(f"{folder} holds no complete set of shards ({MANIFEST_FILE} is missing): {remedy}")
    table = read_json(path)
    try:
        _check_settings(table["settings"])
        manifest = Manifest(
            settings=table["settings"],
            skipped=_counts(table["skipped"]),
            splits=_splits(table["splits"], "index"),
            shards=[_splits(shard, "tokens", "documents") for shard in _typed(table["shards"], list)],
            sources={
                name: SourceFile(
                    num_bytes=_typed(hashes["num_bytes"], int),
                    sha256=_typed(hashes["sha256"], str),
                    content=_typed(hashes["content"], str),
                )
                for name, hashes in table.get("sources", {}).items()
            },
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it and prepare again") from error
    if not manifest.shards:
        raise UserError(f"{path} is damaged (it has no shard): delete it and prepare again")
    if manifest.settings["format"] != FORMAT:
        raise UserError(
            f"{folder} was prepared in format {manifest.settings['format']}, and this version reads format "
            f"{FORMAT}: read it with the version that wrote it, or prepare into another folder"
        )
    return manifest


def read_shard(folder: Path, number: int) -> ShardSummary:
    """Read the shard.json of a shard.

    Args:
        folder: The prepared folder.
        number: The shard's number, from 0.

    Raises:
        UserError: shard.json is missing or damaged; names it.
    """
    path = shard_folder(folder, number) / SHARD_FILE
    table = read_json(path)
    try:
        return ShardSummary(
            first=_typed(table["first"], dict, NoneType),
            next=_typed(table["next"], dict, NoneType),
            is_last=_typed(table["is_last"], bool),
            skipped=_counts(table["skipped"]),
            splits=_splits(table["splits"], "tokens", "documents"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete {path.parent} and prepare again") from error


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass or a dictionary as JSON, atomically.

    Args:
        path: The file.
        value: Its content.

    Raises:
        DiskFullError: The disk is full.
    """
    table = value if isinstance(value, dict) else asdict(value)
    write_text(path, json.dumps(table, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a dictionary that `write_json` wrote.

    Args:
        path: The file.

    Raises:
        UserError: The file cannot be read or does not hold a JSON object; names it.
    """
    remedy = f"delete {path.parent if path.name == SHARD_FILE else path} and prepare again"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}): {remedy}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} is damaged: {remedy}")
    return table


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_settings(settings: dict[str, Any]) -> None:
    """Raise KeyError or TypeError unless settings have what readers of shards look up."""
    _typed(settings["format"], int)
    tokenizer, source = settings["tokenizer"], settings["source"]
    for key, kind in (("name", str), ("fingerprint", str), ("vocab_size", int), ("end_of_document_id", int)):
        _typed(tokenizer[key], kind)
    kind = _typed(source.get("kind"), str, NoneType)
    if kind == "hub":
        _typed(source["repository"], str)
    elif kind == "datasets":
        for key, kinds in (("path", (str,)), ("name", (str, NoneType)), ("split", (str,))):
            _typed(source[key], *kinds)


def _splits(table: dict[str, Any], *hashes: str) -> dict[ShardSplit, SplitSummary]:
    return {
        split: SplitSummary(
            documents=_typed(table[split]["documents"], int),
            tokens=_typed(table[split]["tokens"], int),
            sha256={suffix: _typed(table[split]["sha256"][suffix], str) for suffix in hashes},
        )
        for split in SPLITS
    }


def _counts(table: dict[str, Any]) -> dict[str, int]:
    return {reason: _typed(count, int) for reason, count in table.items()}


def _typed(value: Any, *kinds: type) -> Any:
    """Return a value of one of some types; raise TypeError for another."""
    if type(value) not in kinds:
        raise TypeError(f"{value!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
    return value
