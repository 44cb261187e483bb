"""From the `[data]` table to sources of documents, and what is wrong with them before anything is built."""

from pathlib import Path

from data.config import (
    DataConfig,
    HubSource,
    JsonlSource,
    LeafSource,
    MixtureSource,
    ParquetSource,
    ShardsSource,
    Source,
    Split,
    TextSource,
)
from data.sources.base import DocumentSource
from data.sources.files import DocumentFile, FileDocuments
from data.sources.hub import hub_files
from data.sources.jsonl import JsonlDocumentFile
from data.sources.mixture import MixtureDocuments
from data.sources.parquet import ParquetDocumentFile, local_files
from data.sources.shards import ShardDocuments
from data.sources.text import text_files


def open_text(
    source: ParquetSource | JsonlSource | TextSource | HubSource,
    *,
    split: Split = "all",
    shuffle_seed: int | None = None,
    is_reporter: bool = True,
) -> FileDocuments:
    """Open a source of text.

    Args:
        source: Where the text lies.
        split: Which documents to give, by data/sources/split.py.
        shuffle_seed: Seed of the order; None for the order in which rows lie.
        is_reporter: Whether this process logs what was skipped.

    Raises:
        ValueError: If a file is missing, lacks a column, or is damaged where that is to stop the run.
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
    return FileDocuments(
        files,
        source,
        description=_describe(files),
        split=split,
        shuffle_seed=shuffle_seed,
        is_reporter=is_reporter,
    )


def open_source(
    source: Source,
    *,
    tokenizer_fingerprint: str,
    split: Split,
    shuffle_seed: int | None = None,
    is_reporter: bool = True,
) -> DocumentSource:
    """Open any source.

    Args:
        source: Where the documents lie.
        tokenizer_fingerprint: The run's tokenizer; shards must be of the same one.
        split: Which documents to give, by data/sources/split.py.
        shuffle_seed: Seed of the order; None for the order in which documents lie.
        is_reporter: Whether this process logs what was skipped.

    Raises:
        ValueError: If a file is missing, lacks a column, or is damaged where that is to stop the run, or
            shards are of another tokenizer.
    """

    def open_leaf(leaf: LeafSource) -> DocumentSource:
        if isinstance(leaf, ShardsSource):
            return ShardDocuments(
                leaf,
                tokenizer_fingerprint=tokenizer_fingerprint,
                split=split,
                shuffle_seed=shuffle_seed,
                is_reporter=is_reporter,
            )
        return open_text(leaf, split=split, shuffle_seed=shuffle_seed, is_reporter=is_reporter)

    if isinstance(source, MixtureSource):
        sources = {name: open_leaf(leaf) for name, leaf in source.sources.items()}
        return MixtureDocuments(sources, source.weights)
    return open_leaf(source)


def check_data(config: DataConfig, tokenizer_fingerprint: str) -> None:
    """Find what is wrong with a run's documents before anything is built.

    Args:
        config: What the run reads.
        tokenizer_fingerprint: The run's tokenizer.

    Raises:
        ValueError: If a source cannot be opened, lies here and holds no document, or `validation` reads all
            of what `train` reads; names the table.
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
                source, tokenizer_fingerprint=tokenizer_fingerprint, split=split, is_reporter=False
            )
            # a pass without a document raises; of the hub it would fetch whole files
            if not _comes_from_hub(source):
                next((row for row in opened.read(repeat=False) if row.skipped is None), None)
        except ValueError as error:
            raise ValueError(f"data.{name}: {error}") from error
    if config.validation is None:
        return
    shared = _places(config.train) & _places(config.validation)
    if shared and config.validation_documents == "all":
        raise ValueError(
            f'data.validation_documents is "all", but data.train reads {min(shared)} too: set it to '
            '"held_out" to validate on the documents that training leaves out'
        )


def _comes_from_hub(source: Source) -> bool:
    leaves = source.sources.values() if isinstance(source, MixtureSource) else (source,)
    return any(isinstance(leaf, HubSource) for leaf in leaves)


def _places(source: Source) -> set[str]:
    """Name all that a source reads."""
    match source:
        case MixtureSource():
            return set[str]().union(*map(_places, source.sources.values()))
        case ParquetSource() | JsonlSource():
            return {str(path.resolve()) for path in local_files(source.files, source.kind)}
        case TextSource():
            return {str(file.path.resolve()) for file in text_files(source)}
        case HubSource():
            return {f"{source.repository}/{name}" for name in source.file_names}
        case ShardsSource():
            return {str(Path(source.folder).resolve())}


def _describe(files: list[DocumentFile]) -> str:
    more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
    return ", ".join(str(file) for file in files[:3]) + more
