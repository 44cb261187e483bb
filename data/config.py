"""The `[data]` table of a run: the sources of documents, the tokenizer and the packing."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

from data.ultra_fineweb import PARTS, REPOSITORY, REVISION, part_files
from errors import MAX_SEED, UserError, called, check_not_empty, check_range
from tokens import END_OF_DOCUMENT

# documents of a source to keep; data/sources/split.py splits them by content
Split: TypeAlias = Literal["all", "train", "held_out"]


_MAX_CHARACTERS = 10**12


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Filters of every source of text; skipped rows are counted by reason.

    Attributes:
        min_characters: Skip documents of fewer characters; None for no limit.
        max_characters: Skip documents of more characters; None for no limit.
        on_damaged_file: "stop" ends the run with the file's name, "skip" skips the rest of the file.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    on_damaged_file: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        check_range(self, 0, _MAX_CHARACTERS, "min_characters")
        check_range(self, 1, _MAX_CHARACTERS, "max_characters")
        if self.max_characters is not None and self.max_characters < (self.min_characters or 0):
            low, high = called("min_characters"), called("max_characters")
            raise UserError(
                f"{low} is {self.min_characters} and {high} {self.max_characters}: want {low} <= {high}, or "
                "leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class ColumnOptions(TextOptions):
    """Columns (or JSON keys) of a source, and the filter by quality score.

    Attributes:
        text_column: The column of the text; "data.text" is the field text of the column data, unless a column
            has that name.
        score_column: The column of the quality score; read only if `min_score` is set.
        min_score: Skip rows with a lower score; None for no limit. Scores of any type are converted to float.
    """

    text_column: str = "content"
    score_column: str = "score"
    min_score: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty(self, "text_column", "score_column")
        check_range(self, -1e30, 1e30, "min_score")


def _check_files(kind: str, files: list[str]) -> None:
    if not all(files) or not files:
        raise UserError(f"{called('files')} of a {kind} source is {files}: name at least one path or glob")


@dataclass(frozen=True, kw_only=True)
class ParquetSource(ColumnOptions):
    """Local parquet files, one document per row.

    Attributes:
        kind: Always "parquet".
        files: Paths or globs, relative to the working directory, in this order; a glob's matches are sorted.
    """

    kind: Literal["parquet"] = "parquet"
    files: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_files(self.kind, self.files)


@dataclass(frozen=True, kw_only=True)
class JsonlSource(ColumnOptions):
    """Local files of JSON objects, one document per line; gzip, bzip2, Zstandard, LZ4 and xz are read too.

    Compression is told by a file's first bytes, not by its name.

    Attributes:
        kind: Always "jsonl".
        files: Paths or globs, relative to the working directory, in this order; a glob's matches are sorted.
        text_column: The key of the text; "data.text" is the key text of the object at data, unless a key has
            that name.
    """

    kind: Literal["jsonl"] = "jsonl"
    files: list[str]
    text_column: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_files(self.kind, self.files)


@dataclass(frozen=True, kw_only=True)
class TextSource(TextOptions):
    """A folder of text files, one document per file.

    Attributes:
        kind: Always "text".
        folder: The folder, relative to the working directory.
        pattern: Glob of the files, relative to the folder; matches are sorted.
    """

    kind: Literal["text"] = "text"
    folder: str
    pattern: str = "**/*.txt"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty(self, "folder", "pattern")


@dataclass(frozen=True, kw_only=True)
class HubSource(ColumnOptions):
    """Parquet files of a dataset on the Hugging Face hub, downloaded one by one, ahead of need.

    Files are named, the repository is never listed: Ultra-FineWeb's holds tens of thousands of other files.

    Attributes:
        kind: Always "hub".
        repository: The dataset's name.
        revision: Commit to read; a branch may move, after which a run cannot be reproduced.
        files: Paths in the repository, in this order; or None, and `language` and `parts` name them.
        language: Language of Ultra-FineWeb.
        parts: Part numbers of Ultra-FineWeb, such as "1-20" or "1-4,9".
    """

    kind: Literal["hub"] = "hub"
    repository: str = REPOSITORY
    revision: str = REVISION
    files: list[str] | None = None
    language: Literal["en", "zh"] = "en"
    parts: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty(self, "repository", "revision")
        if (self.files is None) == (self.parts is None):
            raise UserError(
                "a hub source needs either files or parts: give a list of paths, or for Ultra-FineWeb parts "
                f'such as "1-20" (en has {PARTS["en"]}, zh {PARTS["zh"]})'
            )
        if self.files is not None:
            _check_files(self.kind, self.files)
        elif self.repository != REPOSITORY:
            raise UserError(
                f"{called('parts')} names files of {REPOSITORY}, but {called('repository')} is "
                f"{self.repository!r}: give {called('files')}"
            )
        if self.repository != REPOSITORY and self.revision == REVISION:
            raise UserError(
                f"{called('revision')} is a commit of {REPOSITORY}, but {called('repository')} is "
                f"{self.repository!r}: give a commit of that repository"
            )
        twice = [name for name, count in Counter(self.file_names).items() if count > 1]
        if twice:
            raise UserError(f"{called('files')} of a hub source has {twice[0]!r} twice: name it once")
        others = [name for name in self.file_names if not name.endswith(".parquet")]
        if others:
            raise UserError(
                f"{called('files')} of a hub source has {others[0]!r}: want parquet files (.parquet)"
            )

    @property
    def file_names(self) -> list[str]:
        """Paths in the repository.

        Raises:
            UserError: `parts` is not a list of part numbers.
        """
        if self.parts is not None:
            return part_files(self.language, self.parts)
        return self.files or []


@dataclass(frozen=True, kw_only=True)
class DatasetsSource(ColumnOptions):
    """A dataset that the Hugging Face `datasets` library opens; the keys are arguments of `load_dataset`.

    Not for Ultra-FineWeb, whose tens of thousands of files the library lists first: use kind "hub".

    Attributes:
        kind: Always "datasets".
        path: A dataset's name on the hub, a folder of data files, or a folder that `save_to_disk` wrote.
        name: The dataset's config; None for its only or default one.
        split: A split of the dataset, whole: held-out documents are split off by `validation_documents`.
        revision: Commit, tag or branch on the hub; None for the newest commit, with which a run cannot be
            reproduced once there is a newer one.
        streaming: Whether to read the files while training, in the order of shards and blocks of rows. If
            not, the library downloads and prepares the whole dataset first, and the shuffle is a full one.
        text_column: The column of the text.
        on_damaged_file: "skip" skips the rest of a damaged shard while streaming; the library never prepares
            a dataset with a damaged file.
    """

    kind: Literal["datasets"] = "datasets"
    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    text_column: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty(self, "path", "name", "revision")
        if self.path.rstrip("/").lower() == REPOSITORY.lower():
            raise UserError(
                f"{called('path')} of a datasets source is {self.path!r}, whose tens of thousands of files "
                f'the library would list first: use {called("parts")} of a source of kind "hub", such as '
                '"1-20"'
            )
        if not re.fullmatch(r"\w[\w.-]*", self.split) or self.split == "all":
            raise UserError(
                f"split is {self.split!r}: want the name of one split, whole; to validate on held-out "
                'documents of it, set data.validation_documents to "held_out"'
            )


@dataclass(frozen=True, kw_only=True)
class ShardsSource:
    """Token shards that `python -m data.shards prepare` wrote.

    Attributes:
        kind: Always "shards".
        folder: The prepared folder, relative to the working directory.
        on_damaged_file: "stop" ends the run with the file's name at a damaged document; "skip" skips that
            document, which makes every rank read every document.
    """

    kind: Literal["shards"] = "shards"
    folder: str
    on_damaged_file: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        check_not_empty(self, "folder")


TextKind: TypeAlias = ParquetSource | JsonlSource | TextSource | HubSource | DatasetsSource
LeafSource: TypeAlias = TextKind | ShardsSource


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """Several sources interleaved by weight, each repeating at its own rate.

    Attributes:
        kind: Always "mixture".
        weights: Each source's proportion of the text, by its name; they need not add up to 1. Text is counted
            in characters, and a token of shards as four.
        sources: The sources, by the same names.
    """

    kind: Literal["mixture"] = "mixture"
    weights: dict[str, float]
    sources: dict[str, LeafSource]

    def __post_init__(self) -> None:
        if not self.sources or set(self.weights) != set(self.sources):
            raise UserError(
                f"weights of a mixture names {sorted(self.weights)}, but sources names "
                f"{sorted(self.sources)}: give each source one weight"
            )
        for name, weight in self.weights.items():
            if not 1e-18 <= weight <= 1e18:
                raise UserError(
                    f"weights.{name} of a mixture is {weight}: must be at least 1e-18 and at most 1e18"
                )


Source: TypeAlias = LeafSource | MixtureSource


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The documents that a run reads, and how they become sequences.

    Attributes:
        tokenizer: A folder that holds a tokenizer.json, that file, or a model's name on the Hugging Face hub,
            such as "Qwen/Qwen3-0.6B-Base", optionally with "@" and a revision.
        train: Source of the training documents; documents that data/sources/split.py holds out are skipped.
        validation: Source of the validation documents; None for a run without validation.
        validation_documents: "all" reads every document of `validation`; "held_out" only those that training
            skips, for a `validation` of the same files as `train`.
        packing: "concatenate" splits the stream of documents every T tokens. "best_fit" packs whole documents
            into rows with at most 1% padding and splits few that fit into a row; it tokenizes 512 rows of
            documents at a time, for which a step may wait (shards are tokenized already). Validation always
            concatenates, so that losses are comparable across packings.
        shuffle_seed: Seed of the shuffle of `train`: its documents, anew each epoch, and the rows that they
            are packed into. None for the order of the files. Validation is never shuffled.
        shuffle_window: Rows that are shuffled together, for a `train` other than shards; None for 16 times
            the global batch. They are held in memory, and a start or a resume reads them before its first
            step. The rows of shards are shuffled in windows of 65,536 or more, of which only the layout is
            held.
        mask_documents: Whether a token attends only to its own document. If not, rows are plain causal
            sequences.
        end_of_document: The token that ends each document; must be in the tokenizer's vocabulary.
        prefetch_batches: Micro-batches that a background thread prepares ahead; 0 for no thread.
    """

    tokenizer: str
    train: Source
    validation: Source | None = None
    validation_documents: Literal["all", "held_out"] = "all"
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    shuffle_seed: int | None = 0
    shuffle_window: int | None = None
    mask_documents: bool = True
    end_of_document: str = END_OF_DOCUMENT
    prefetch_batches: int = 4

    def __post_init__(self) -> None:
        check_not_empty(self, "tokenizer", "end_of_document")
        check_range(self, 0, MAX_SEED, "shuffle_seed")
        check_range(self, 0, 100_000, "prefetch_batches")
        check_range(self, 1, 1 << 30, "shuffle_window")
        if self.shuffle_window is None:
            return
        if self.shuffle_seed is None or isinstance(self.train, ShardsSource):
            unused = "shuffle_seed is none" if self.shuffle_seed is None else "train reads shards alone"
            raise UserError(
                f"shuffle_window is {self.shuffle_window}, but {unused}, for which no window is held: set it "
                'to "none"'
            )
