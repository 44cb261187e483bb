"""Open the sources of a config's `[data]` table, and check them before a run is built."""

from pathlib import Path

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
    Split,
    TextKind,
    TextSource,
)
from data.sources.base import DocumentSource
from data.sources.files import DocumentFile, FileDocuments
from data.sources.hub import hub_files
from data.sources.jsonl import JsonlDocumentFile
from data.sources.mixture import MixtureDocuments
from data.sources.overlap import check_overlap
from data.sources.parquet import ParquetDocumentFile, local_files
from data.sources.shard_format import read_manifest
from data.sources.shards import ShardDocuments
from data.sources.text import text_files
from errors import UserError


def open_text(
    source: TextKind,
    *,
    split: Split = "all",
    shuffle_seed: int | None = None,
    log_skipped: bool = True,
) -> FileDocuments:
    """Open a source of text.

    Args:
        source: The source's config.
        split: Documents to keep, by data/sources/split.py.
        shuffle_seed: Seed of the shuffle; None for the order of the files.
        log_skipped: Whether this process logs skipped rows.

    Raises:
        UserError: A file is missing, lacks a column, or is damaged while on_damaged_file is "stop".
    """
    files: list[DocumentFile]
    match source:
        case ParquetSource():
            files = [ParquetDocumentFile(path, source) for path in local_files(source.files, source.kind)]
        case JsonlSource():
            files = [JsonlDocumentFile(path, source) for path in local_files(source.files, source.kind)]
        case TextSource():
            files = [*text_files(source)]
        case HubSource():
            files = [*hub_files(source)]
        case DatasetsSource():
            # imported here: the library takes a second to import, and few runs need it
            from data.sources.hf_datasets import dataset_files

            files = dataset_files(source)
    return FileDocuments(
        files,
        source,
        description=_describe(files),
        split=split,
        shuffle_seed=shuffle_seed,
        log_skipped=log_skipped,
    )


def open_source(
    source: Source,
    *,
    tokenizer_fingerprint: str,
    split: Split,
    shuffle_seed: int | None = None,
    log_skipped: bool = True,
) -> DocumentSource:
    """Open a source of any kind.

    Args:
        source: The source's config.
        tokenizer_fingerprint: Fingerprint of the run's tokenizer; shards must have been made with it.
        split: Documents to keep, by data/sources/split.py.
        shuffle_seed: Seed of the shuffle; None for the stored order.
        log_skipped: Whether this process logs skipped rows.

    Raises:
        UserError: A file is missing, lacks a column, or is damaged while on_damaged_file is "stop", or shards
            were made with another tokenizer.
    """

    def open_leaf(leaf: LeafSource) -> DocumentSource:
        if isinstance(leaf, ShardsSource):
            return ShardDocuments(
                leaf,
                tokenizer_fingerprint=tokenizer_fingerprint,
                split=split,
                shuffle_seed=shuffle_seed,
                log_skipped=log_skipped,
            )
        return open_text(leaf, split=split, shuffle_seed=shuffle_seed, log_skipped=log_skipped)

    if isinstance(source, MixtureSource):
        sources = {name: open_leaf(leaf) for name, leaf in source.sources.items()}
        return MixtureDocuments(sources, source.weights)
    return open_leaf(source)


def check_shards(config: DataConfig) -> None:
    """Check that prepared shards are there, which needs no tokenizer: that one may have to be downloaded.

    Args:
        config: The `[data]` table.

    Raises:
        UserError: A folder of shards is missing or incomplete; names the table.
    """
    for name, source in (("train", config.train), ("validation", config.validation)):
        leaves = source.sources.values() if isinstance(source, MixtureSource) else (source,)
        for leaf in leaves:
            if isinstance(leaf, ShardsSource):
                try:
                    read_manifest(Path(leaf.folder))
                except UserError as error:
                    raise UserError(f"data.{name}: {error}") from error


def check_data(config: DataConfig, tokenizer_fingerprint: str) -> None:
    """Check a run's sources before anything is built.

    Args:
        config: The `[data]` table.
        tokenizer_fingerprint: Fingerprint of the run's tokenizer.

    Raises:
        UserError: A source cannot be opened, a local one holds no document, or `validation` reads documents
            that `train` reads too; names the table.
    """
    tables: list[tuple[str, Source | None, Split]] = [
        ("train", config.train, "train"),
        ("validation", config.validation, config.validation_documents),
    ]
    for name, source, split in tables:
        if source is None:
            continue
        try:
            opened = open_source(
                source, tokenizer_fingerprint=tokenizer_fingerprint, split=split, log_skipped=False
            )
            # an epoch without a document raises; a source on the hub would download whole files to find out
            if not _reads_hub(source):
                next((row for row in opened.read(repeat=False) if row.skipped is None), None)
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from error
    check_overlap(config)


def _reads_hub(source: Source) -> bool:
    leaves = source.sources.values() if isinstance(source, MixtureSource) else (source,)
    return any(isinstance(leaf, HubSource) for leaf in leaves)


def _describe(files: list[DocumentFile]) -> str:
    more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
    return ", ".join(str(file) for file in files[:3]) + more
