"""What a folder of prepared shards holds.

    prepare.json                      what is being prepared: written first, another preparation is refused
    shards/00000/train.tokens         token ids, uint32 little-endian, documents one after another
    shards/00000/train.documents      length and CRC-32 of each document, in tokens
    shards/00000/held_out.*           the documents that data/sources/split.py keeps from training
    shards/00000/shard.json           counts, hashes, and the positions in the source where it begins and ends
    train.index, held_out.index       each document's first token, counted over all shards, and its CRC-32
    manifest.json                     all of it in short: written last, so that with it the folder is whole

A shard's folder appears whole or not at all, so nothing written before a kill is lost or written twice.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

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
# One record a document and a last one whose start is the number of all tokens.
INDEX = np.dtype([("start", "<u8"), ("crc32", "<u4")])


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What a shard or a folder holds of one split.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens, the end-of-document tokens included.
        sha256: Of each file by its suffix.
    """

    documents: int
    tokens: int
    sha256: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What shard.json holds.

    Attributes:
        first: Position in the source at which the shard begins; None for the start.
        next: Position after its last row.
        is_last: Whether nothing follows.
        skipped: Rows of the source that are no documents, by reason.
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
class Manifest:
    """What manifest.json holds.

    Attributes:
        settings: What was prepared and with which tokenizer, as in prepare.json.
        skipped: Rows of the source that are no documents, by reason.
        splits: Counts and hashes of the whole.
        shards: Counts and hashes of each shard's splits, in order.
    """

    settings: dict[str, Any]
    skipped: dict[str, int]
    splits: dict[ShardSplit, SplitSummary]
    shards: list[dict[ShardSplit, SplitSummary]]


def shard_folder(folder: Path, number: int) -> Path:
    """Return where a shard lies.

    Args:
        folder: The folder of all.
        number: Of the shard, from 0.
    """
    return folder / SHARDS_FOLDER / f"{number:05}"


def index_file(folder: Path, split: ShardSplit) -> Path:
    """Return where the index of a split lies."""
    return folder / f"{split}.index"


def read_manifest(folder: Path) -> Manifest:
    """Read a whole folder's manifest.

    Args:
        folder: The folder.

    Raises:
        ValueError: If there is none, or it is damaged or of another format.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        is_begun = (folder / SETTINGS_FILE).exists()
        raise ValueError(
            f"{folder} holds no prepared shards that are whole ({MANIFEST_FILE} is missing): "
            + (
                "run the same `python -m data.shards prepare` again to go on"
                if is_begun
                else "correct the folder"
            )
        )
    table = read_json(path)
    try:
        return Manifest(
            settings=table["settings"],
            skipped=table["skipped"],
            splits=_splits(table["splits"]),
            shards=[_splits(shard) for shard in table["shards"]],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete it and prepare again") from error


def read_shard(folder: Path, number: int) -> ShardSummary:
    """Read what a shard says of itself.

    Args:
        folder: The folder of all.
        number: Of the shard.

    Raises:
        ValueError: If shard.json is missing or damaged; names it.
    """
    path = shard_folder(folder, number) / SHARD_FILE
    table = read_json(path)
    try:
        return ShardSummary(
            first=table["first"],
            next=table["next"],
            is_last=table["is_last"],
            skipped=table["skipped"],
            splits=_splits(table["splits"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete {path.parent} and prepare again") from error


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass or a table as JSON, whole or not at all.

    Args:
        path: The file.
        value: What it is to hold.
    """
    table = value if isinstance(value, dict) else asdict(value)
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a table that `write_json` wrote.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be read, or is no table; names it.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): delete {path.parent} and prepare again") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is damaged: delete {path.parent} and prepare again")
    return table


def replace(partial: Path, path: Path) -> None:
    """Put a file or a folder in its place, once what it holds is on the disk."""
    for each in [*sorted(partial.iterdir()), partial] if partial.is_dir() else [partial]:
        _sync(each)
    os.replace(partial, path)
    _sync(path.parent)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _splits(table: dict[str, Any]) -> dict[ShardSplit, SplitSummary]:
    names = {field.name for field in fields(SplitSummary)}
    return {split: SplitSummary(**{name: table[split][name] for name in names}) for split in SPLITS}
