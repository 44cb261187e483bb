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
    files that shards were made from count as read, and so do the data files of a local dataset. A dataset of
    the hub is not known by its files: it shares all with a hub source of the same repository.

    Args:
        config: The `[data]` table.

    Raises:
        UserError: `validation_documents` is "all", and a file is read by both.
    """
    if config.validation is None or config.validation_documents == "held_out":
        return
    shared = sorted(_locations(config.train) & _locations(config.validation))
    shared = shared or _shared_repositories(config.train, config.validation)
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
                found |= {f"{leaf.repository.lower()}/{name}" for name in leaf.file_names}
            case DatasetsSource():
                found |= _dataset(leaf)
            case ShardsSource():
                folder = Path(leaf.folder)
                found |= {str(folder.resolve()), *_sources_of(read_manifest(folder))}
    return found


def _sources_of(manifest: Manifest) -> Iterator[str]:
    """Yield the files that shards were made from."""
    source: dict[str, Any] = manifest.settings["source"]
    if source.get("kind") == "hub":
        names = source.get("files") or part_files(source["language"], source["parts"])
        yield from (f"{source['repository'].lower()}/{name}" for name in names)
        return
    if source.get("kind") == "datasets":
        yield from _dataset(_prepared_from(source))
        return
    # folders of earlier versions have no hashes
    yield from (str(Path(path).resolve()) for path in manifest.sources or source.get("files", []))


def _prepared_from(source: dict[str, Any]) -> DatasetsSource:
    """Return the source that shards of a dataset were made from, whatever its columns and filters."""
    return DatasetsSource(**{key: source[key] for key in ("path", "name", "split")})


def _dataset(source: DatasetsSource) -> set[str]:
    """Name a split of a dataset, whatever its revision, and its data files if it is local."""
    is_local = Path(source.path).is_dir()
    where = str(Path(source.path).resolve()) if is_local else source.path.lower()
    return {
        f"{where} ({source.name or 'default'}, {source.split})",
        *(str(path.resolve()) for path in _data_files(source)),
    }


def _data_files(source: DatasetsSource) -> list[Path]:
    if not Path(source.path).is_dir():
        return []
    # imported here: the library takes a second to import, and few runs need it
    from data.sources.hf_datasets import local_data_files

    try:
        return local_data_files(source)
    except UserError:  # a run that reads it has opened it; shards may outlive what they were made from
        return []


def _shared_repositories(train: Source, validation: Source) -> list[str]:
    """Return the repositories that one reads as files of the hub and the other as a dataset."""
    theirs, ours = _repositories(validation), _repositories(train)
    return sorted(theirs["hub"] & ours["datasets"] | theirs["datasets"] & ours["hub"])


def _repositories(source: Source) -> dict[str, set[str]]:
    """Return the repositories of the hub that a source reads, or that its shards were made from, by kind."""
    found: dict[str, set[str]] = {"hub": set(), "datasets": set()}
    for leaf in leaves(source):
        if isinstance(leaf, HubSource):
            found["hub"].add(leaf.repository.lower())
        elif isinstance(leaf, DatasetsSource):
            found["datasets"].add(leaf.path.lower())
        elif isinstance(leaf, ShardsSource):
            settings = read_manifest(Path(leaf.folder)).settings["source"]
            if settings.get("kind") in found:
                name = settings["repository"] if settings["kind"] == "hub" else settings["path"]
                found[settings["kind"]].add(name.lower())
    return found


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
        elif isinstance(leaf, DatasetsSource):
            for path in _data_files(leaf):
                yield _File(str(path), path.stat().st_size, None)
        elif isinstance(leaf, ShardsSource):
            manifest = read_manifest(Path(leaf.folder))
            settings = manifest.settings["source"]
            if settings.get("kind") == "datasets":
                for data_file in _data_files(_prepared_from(settings)):
                    yield _File(str(data_file), data_file.stat().st_size, None)
            elif settings.get("kind") != "text":
                for path, file in manifest.sources.items():
                    yield _File(path, file.num_bytes, file.content)
