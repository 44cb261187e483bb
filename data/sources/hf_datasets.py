"""The "datasets" source: any dataset that the `datasets` library opens, from the hub or from a folder.

A dataset that is not streamed is one file with an index: rows are read by number, and a shuffle permutes all
of them (data/permutation.py), in constant memory. A streamed one has a file per shard of the library, such as
a parquet file, which can only be read in order: FileDocuments permutes the shards, and rows within blocks.

Two things of the library are not used. Its `shuffle` loses what is in the buffer on resume. Its `state_dict`
of a stream finds the same row again, but no faster than `skip` (both read the shard from its start), and not
as the same state: two readers at one row may report different ones, so that checkpoints would differ.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import constants

from data.config import DatasetsSource
from data.permutation import Permutation
from data.sources.content import content_hash
from data.sources.files import DamagedFileError, DocumentFile, RawRow
from errors import UserError, called

_BATCH_ROWS = 64
_SAVED_FILES = ("state.json", "dataset_dict.json")
# not errors of the files' content: the network, the cache, the library's own refusals
_LIBRARY_ERRORS = (OSError, ValueError, RuntimeError, httpx.HTTPError, pa.ArrowException, DatasetsError)


class IndexedDataset:
    """A prepared dataset as one file whose rows can be read in any order.

    Args:
        dataset: Yields the columns to read as arrow tables.
        source: Names the columns.
        identity: The dataset's name without its folder, and plain JSON that determines the rows.
        order: Order of the rows; None for the stored one.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        source: DatasetsSource,
        identity: list[Any],
        order: Permutation | None = None,
    ) -> None:
        self._dataset = dataset
        self._source = source
        self._order = order
        self.identity = [*identity, len(dataset)]

    def __str__(self) -> str:
        return _name(self._source)

    def permuted(self, *key: int | str) -> "IndexedDataset":
        """Return the dataset with its rows in the order of a permutation, which the key determines."""
        order = Permutation(len(self._dataset), *key)
        return IndexedDataset(self._dataset, self._source, self.identity[:-1], order)

    def check(self) -> None:
        """Do nothing: the library has checked the rows when it prepared them."""

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield rows in order from a given one.

        Args:
            row: Index in the order of the rows.

        Raises:
            UserError: The prepared dataset cannot be read.
        """
        for first in range(row, len(self._dataset), _BATCH_ROWS):
            indices = np.arange(first, min(first + _BATCH_ROWS, len(self._dataset)))
            if self._order is not None:
                indices = self._order(indices)
            with _reading(self):
                table = self._dataset[indices.tolist()]
                texts = _values(table[self._source.text_column])
                scores: list[object] = [None] * len(texts)
                if self._source.min_score is not None:
                    scores = table[self._source.score_column].to_pylist()
            for next_row, (text, score) in enumerate(zip(texts, scores, strict=True), first + 1):
                yield RawRow(next_row, text, score)

    def progress(self, row: int) -> float:
        """Return the fraction of the rows that precede a row."""
        return row / len(self._dataset) if len(self._dataset) else 0.0

    def prefetch(self) -> None:
        """Do nothing: the rows are local."""


class StreamedShard:
    """A shard of a streamed dataset; a row's number is its index in the shard.

    Args:
        dataset: All shards.
        source: Names the columns.
        identity: The dataset's name without its folder, and plain JSON that determines the rows.
        index: Index of the shard.
    """

    def __init__(
        self, dataset: datasets.IterableDataset, source: DatasetsSource, identity: list[Any], index: int
    ) -> None:
        self._dataset = dataset
        self._source = source
        self._index = index
        name, *content = identity
        self.identity = [f"shard {index + 1} of {dataset.num_shards} of {name}", *content]

    def __str__(self) -> str:
        return f"shard {self._index + 1} of {self._dataset.num_shards} of {_name(self._source)}"

    def check(self) -> None:
        """Do nothing: whether a shard can be read is known only once it is."""

    def read(self, row: int) -> Iterator[RawRow]:
        """Yield rows in order from a given one; those before it are read too, and dropped.

        Args:
            row: Index of the first row.

        Raises:
            DamagedFileError: The shard is damaged.
            UserError: The shard is gone or unreachable.
        """
        score_column = None if self._source.min_score is None else self._source.score_column
        with _reading(self):
            shard = self._dataset.shard(self._dataset.num_shards, self._index)
            rows = iter(shard.skip(row) if row else shard)
        for next_row in itertools.count(row + 1):
            with _reading(self):
                values = next(rows, None)
            if values is None:
                return
            score = None if score_column is None else values.get(score_column)
            yield RawRow(next_row, values.get(self._source.text_column), score)

    def progress(self, row: int) -> float:
        """Return 0: the library does not tell how long a shard is."""
        return 0.0

    def prefetch(self) -> None:
        """Do nothing: a shard is read as it is needed."""


def dataset_files(source: DatasetsSource) -> list[DocumentFile]:
    """Open a dataset, which downloads and prepares it unless it is streamed or prepared already.

    Args:
        source: The source's config.

    Returns:
        One file for a prepared dataset, a file per shard for a streamed one.

    Raises:
        UserError: The dataset, its config, its split, its revision or a column does not exist, or the hub
            cannot be reached; names the key.
    """
    with _opening(source):
        dataset, identity = _saved(source) if _is_saved(source) else _loaded(source)
        # the columns of a streamed text format are known once it is read, and may differ between rows
        columns = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    needed = _needed_columns(columns, source)
    if isinstance(dataset, datasets.Dataset):
        return [IndexedDataset(dataset.with_format("arrow", columns=needed), source, identity)]
    if dataset.column_names is not None:
        dataset = dataset.select_columns(needed)
    return [StreamedShard(dataset, source, identity, index) for index in range(dataset.num_shards)]


def local_data_files(source: DatasetsSource) -> list[Path]:
    """Return the local files that a dataset's split is made of; none of a dataset of the hub.

    Args:
        source: The source's config.

    Raises:
        UserError: The folder is no dataset, or has no such split; names the key.
    """
    if not Path(source.path).is_dir():
        return []
    with _opening(source):
        if _is_saved(source):
            return [Path(each["filename"]) for each in _saved(source)[0].cache_files]
        builder = _builder(source)
        return [Path(file) for file in _data_files(builder, source)[source.split]]


def _is_saved(source: DatasetsSource) -> bool:
    return any((Path(source.path) / name).is_file() for name in _SAVED_FILES)


def _saved(source: DatasetsSource) -> tuple[datasets.Dataset, list[Any]]:
    """Open a folder that `save_to_disk` wrote."""
    for key in ("name", "revision"):
        if getattr(source, key) is not None:
            raise UserError(
                f"{key} is {getattr(source, key)!r}, but {source.path} was written by save_to_disk"
            )
    saved = datasets.load_from_disk(source.path)
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise UserError(f"split is {source.split!r}, but {source.path} has {sorted(map(str, saved))}")
        saved = saved[source.split]
    elif saved.split is not None and str(saved.split) != source.split:
        raise UserError(f"split is {source.split!r}, but {source.path} has {str(saved.split)!r}")
    return saved, [f"saved dataset ({source.split})", saved._fingerprint]


def _loaded(source: DatasetsSource) -> tuple[datasets.Dataset | datasets.IterableDataset, list[Any]]:
    """Open a folder of data files, or a dataset of the hub."""
    builder = _builder(source)
    files = _data_files(builder, source)
    if source.streaming:
        dataset = builder.as_streaming_dataset(split=source.split)
    else:
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=source.split)
    assert isinstance(dataset, datasets.Dataset | datasets.IterableDataset), "one split"
    folder = Path(source.path)
    if not folder.is_dir():
        return dataset, [f"{source.path} ({builder.config.name}, {source.split}) at {builder.hash}"]
    paths = [Path(file) for file in files[source.split]]
    names = [path.relative_to(folder.resolve()).as_posix() for path in paths]
    content = json.dumps([names, [content_hash(path) for path in paths]])
    name = f"folder of data files ({builder.config.name}, {source.split})"
    return dataset, [name, hashlib.sha256(content.encode()).hexdigest()]


def _builder(source: DatasetsSource) -> datasets.DatasetBuilder:
    """Look up a folder of data files, or a dataset of the hub."""
    folder = Path(source.path)
    is_local = folder.is_dir()
    if not is_local and source.path.count("/") != 1:
        raise UserError(
            f"{called('path')} is {source.path!r}, which is neither a folder nor the name of a dataset on "
            'the hub, such as "HuggingFaceFW/fineweb-edu": correct it'
        )
    if is_local and source.revision is not None:
        raise UserError(f"revision is {source.revision!r}, but path is the folder {source.path}: remove it")
    path = str(folder.resolve()) if is_local else source.path
    builder = datasets.load_dataset_builder(path, source.name, revision=source.revision)
    if source.revision is not None and _is_from_cache(builder) and builder.hash != source.revision:
        raise UserError(
            f"revision is {source.revision!r}, which cannot be fetched, and the cache holds "
            f"{builder.hash!r}: correct it, or fetch it once while online"
        )
    return builder


def _data_files(builder: datasets.DatasetBuilder, source: DatasetsSource) -> Mapping[str, Any]:
    """Return the data files by split; check that there is the source's split."""
    # a dataset of the cache has no data files left, one that is not prepared may have no list of splits
    data_files = builder.config.data_files or {}
    splits = builder.info.splits or data_files
    if source.split not in splits:
        raise UserError(f"split is {source.split!r}, but {source.path} has {sorted(map(str, splits))}")
    return data_files


def _needed_columns(columns: list[str], source: DatasetsSource) -> list[str]:
    needed = {"text_column": source.text_column}
    if source.min_score is not None:
        needed["score_column"] = source.score_column
    for key, column in needed.items():
        if column not in columns:
            raise UserError(
                f"{_name(source)} has no column {column!r} (it has {', '.join(columns) or 'none'}): "
                f"set {called(key)} to the one that holds the {key.partition('_')[0]}"
            )
    return list(needed.values())


def _values(column: pa.ChunkedArray) -> list[object]:
    """Return a column's values, text as bytes, which are decoded row by row: one may not be UTF-8."""
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return (column.cast(pa.large_binary()) if is_text else column).to_pylist()


def _is_from_cache(builder: datasets.DatasetBuilder) -> bool:
    """Return whether the library could not reach the hub and took whichever revision it had prepared last."""
    return type(builder).__module__.startswith("datasets.packaged_modules.cache.")


def _name(source: DatasetsSource) -> str:
    config = "" if source.name is None else f"{source.name}, "
    return f"{source.path} ({config}{source.split})"


@contextlib.contextmanager
def _opening(source: DatasetsSource) -> Iterator[None]:
    """Convert the library's errors while opening a dataset to one line that names the key."""
    try:
        yield
    except UserError:
        raise
    except _LIBRARY_ERRORS as error:
        # "An error occurred while generating the dataset" says nothing, its cause does
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if "Config name is missing" in reason:
            raise UserError(f"name of {source.path} is none: {lines[1]}") from error
        if "BuilderConfig" in reason:
            raise UserError(f"name is {source.name!r}: {reason}") from error
        if "Revision" in reason:
            raise UserError(f"revision is {source.revision!r}: {reason}") from error
        remedy = "check path, and the network and HF_ENDPOINT if it is on the hub"
        if Path(source.path).is_dir():
            remedy = "correct its files"
        elif constants.HF_HUB_OFFLINE:
            remedy = "HF_HUB_OFFLINE is set: prepare it once while online, with streaming off"
        raise UserError(f"cannot open {_name(source)} ({reason}): {remedy}") from error


@contextlib.contextmanager
def _reading(file: IndexedDataset | StreamedShard) -> Iterator[None]:
    """Convert the library's errors while reading rows to errors that name the shard."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # pyarrow raises a bare OSError for damaged compression; errors of the network are subclasses
        is_damaged = isinstance(error, (pa.ArrowException, UnicodeDecodeError)) or type(error) is OSError
        if is_damaged and not getattr(error, "errno", None):
            raise DamagedFileError(
                f"cannot read {file} ({reason}): it is damaged; write it again, or set "
                f'{called("on_damaged_file")} to "skip"'
            ) from error
        raise UserError(f"cannot read {file} ({reason}): it is gone or unreachable") from error
