"""Refuse a run that validates on files that it trains on, whatever their names, also through shards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.config import (
    DataConfig,
    DatasetsSource,
    HubSource,
    JsonlSource,
    LeafSource,
    MixtureSource,
    ParquetSource,
    ShardsSource,
    Source,
    TextSource,
)
from data.sources.content import content_hash
from data.sources.files import convert_read_errors
from data.sources.parquet import local_files
from data.sources.shard_format import Manifest, read_manifest
from data.sources.text import text_files
from data.ultra_fineweb import part_files
from errors import UserError


class _File(NamedTuple):
    """A file of rows, which a copy of another name is recognized by."""

    name: str
    num_bytes: int
    content: str | None  # None: read it

    @property
    def content_hash(self) -> str:
        if self.content is not None:
            return self.content
        with convert_read_errors(self.name):
            return content_hash(Path(self.name))


def check_overlap(config: DataConfig) -> None:
    """Check that validation reads no file that training reads too, unless it reads held-out documents only.

    A file is recognized by its path and, unless it is a text file, which is one document, by its content. The
    files that shards were made from count as read.

    Args:
        config: The `[data]` table.

    Raises:
        UserError: `validation_documents` is "all", and a file is read by both.
    """
    if config.validation is None or config.validation_documents == "held_out":
        return
    shared = sorted(_locations(config.train) & _locations(config.validation))
    shared = shared or _copies(config.train, config.validation)
    if shared:
        raise UserError(
            f'data.validation_documents is "all", but data.train reads {shared[0]} too: set it to '
            '"held_out" to validate on the documents that are held out from training'
        )


def leaves(source: Source) -> list[LeafSource]:
    """Return the sources of a mixture; another source as it is."""
    return [*source.sources.values()] if isinstance(source, MixtureSource) else [source]


def _locations(source: Source) -> set[str]:
    """Return the files and folders that a source reads, and the files that its shards were made from."""
    found: set[str] = set()
    for leaf in leaves(source):
        match leaf:
            case ParquetSource() | JsonlSource():
                found |= {str(path.resolve()) for path in local_files(leaf.files, leaf.kind)}
            case TextSource():
                found |= {str(file.path.resolve()) for file in text_files(leaf)}
            case HubSource():
                found |= {f"{leaf.repository}/{name}" for name in leaf.file_names}
            case DatasetsSource():
                found.add(_dataset(leaf.path, leaf.name, leaf.split))
            case ShardsSource():
                folder = Path(leaf.folder)
                found |= {str(folder.resolve()), *_sources_of(read_manifest(folder))}
    return found


def _sources_of(manifest: Manifest) -> Iterator[str]:
    """Yield the files that shards were made from."""
    source: dict[str, Any] = manifest.settings["source"]
    if source.get("kind") == "hub":
        names = source.get("files") or part_files(source["language"], source["parts"])
        yield from (f"{source['repository']}/{name}" for name in names)
        return
    if source.get("kind") == "datasets":
        yield _dataset(source["path"], source["name"], source["split"])
        return
    # folders of earlier versions have no hashes
    yield from (str(Path(path).resolve()) for path in manifest.sources or source.get("files", []))


def _dataset(path: str, name: str | None, split: str) -> str:
    """Name a split of a dataset, whatever its revision."""
    where = str(Path(path).resolve()) if Path(path).is_dir() else path
    return f"{where} ({name or 'default'}, {split})"


def _copies(train: Source, validation: Source) -> list[str]:
    """Return the validation files whose content training reads under another name."""
    theirs, ours = [*_files(validation)], [*_files(train)]
    # only files of one size can be equal
    sizes = {file.num_bytes for file in theirs} & {file.num_bytes for file in ours} - {0}
    contents = {file.content_hash for file in ours if file.num_bytes in sizes}
    return [file.name for file in theirs if file.num_bytes in sizes and file.content_hash in contents]


def _files(source: Source) -> Iterator[_File]:
    """Yield the local files of rows that a source reads, or that its shards were made from."""
    for leaf in leaves(source):
        if isinstance(leaf, ParquetSource | JsonlSource):
            for path in local_files(leaf.files, leaf.kind):
                yield _File(str(path), path.stat().st_size, None)
        elif isinstance(leaf, ShardsSource):
            manifest = read_manifest(Path(leaf.folder))
            if manifest.settings["source"].get("kind") != "text":
                for path, file in manifest.sources.items():
                    yield _File(path, file.num_bytes, file.content)
