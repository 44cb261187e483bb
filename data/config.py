"""The `[data]` table of a run: where documents come from and how they become sequences."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from data.ultra_fineweb import PARTS, REPOSITORY, REVISION, part_files

# Which documents of a source are read: data/sources/split.py decides by their content.
Split: TypeAlias = Literal["all", "train", "held_out"]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What every source of text may leave out; rows left out are counted by reason.

    Attributes:
        min_characters: Skip documents of fewer characters; None for no limit.
        max_characters: Skip documents of more characters; None for no limit.
        on_damaged_file: "stop" ends the run with the file's name, "skip" goes on with the next file.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    on_damaged_file: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        """Refuse limits that leave nothing."""
        least, most = self.min_characters or 0, self.max_characters
        if least < 0 or (most is not None and most < max(least, 1)):
            raise ValueError(
                f"min_characters is {self.min_characters} and max_characters {most}: want 0 <= "
                'min_characters <= max_characters, or "none"'
            )


@dataclass(frozen=True, kw_only=True)
class ColumnOptions(TextOptions):
    """What every source with named columns (or JSON keys) may say.

    Attributes:
        text_column: The column that holds the text.
        score_column: The column that holds a quality score; read only if there is a `min_score`.
        min_score: Skip rows of a lower score; None for no limit. Scores of any type are cast to a number.
    """

    text_column: str = "content"
    score_column: str = "score"
    min_score: float | None = None

    def __post_init__(self) -> None:
        """Refuse columns without a name."""
        super().__post_init__()
        for name in ("text_column", "score_column"):
            if not getattr(self, name):
                raise ValueError(f'{name} is "": name the column')


def _check_files(kind: str, files: list[str]) -> None:
    if not files:
        raise ValueError(f"files of a {kind} source is an empty list: name at least one path or glob")


@dataclass(frozen=True, kw_only=True)
class ParquetSource(ColumnOptions):
    """Documents in local parquet files, one a row.

    Attributes:
        kind: Tells this source from the others.
        files: Paths or globs, relative to the working directory, in this order; a glob's matches are sorted.
    """

    kind: Literal["parquet"] = "parquet"
    files: list[str]

    def __post_init__(self) -> None:
        """Refuse a source that names nothing."""
        super().__post_init__()
        _check_files(self.kind, self.files)


@dataclass(frozen=True, kw_only=True)
class JsonlSource(ColumnOptions):
    """Documents in local files of JSON objects, one a line; .gz, .bz2 and .zst are read as they are.

    Attributes:
        kind: Tells this source from the others.
        files: Paths or globs, relative to the working directory, in this order; a glob's matches are sorted.
        text_column: The key that holds the text.
    """

    kind: Literal["jsonl"] = "jsonl"
    files: list[str]
    text_column: str = "text"

    def __post_init__(self) -> None:
        """Refuse a source that names nothing."""
        super().__post_init__()
        _check_files(self.kind, self.files)


@dataclass(frozen=True, kw_only=True)
class TextSource(TextOptions):
    """Documents in a folder of text files, one a file.

    Attributes:
        kind: Tells this source from the others.
        folder: The folder, relative to the working directory.
        pattern: Glob of the files below it; matches are sorted.
    """

    kind: Literal["text"] = "text"
    folder: str
    pattern: str = "**/*.txt"


@dataclass(frozen=True, kw_only=True)
class HubSource(ColumnOptions):
    """Documents in parquet files of a data set on the Hugging Face hub, fetched one by one, ahead of need.

    Files are named, never listed: Ultra-FineWeb's repository holds tens of thousands of others.

    Attributes:
        kind: Tells this source from the others.
        repository: The data set's name.
        revision: Commit to read; a branch moves, and what was read can then not be read again.
        files: Paths in the repository, in this order; or None, and `language` and `parts` name them.
        language: Which of Ultra-FineWeb's two sets.
        parts: Numbers of its parts, such as "1-20" or "1-4,9".
    """

    kind: Literal["hub"] = "hub"
    repository: str = REPOSITORY
    revision: str = REVISION
    files: list[str] | None = None
    language: Literal["en", "zh"] = "en"
    parts: str | None = None

    def __post_init__(self) -> None:
        """Refuse a source that names nothing, or names files of an unknown layout by number."""
        super().__post_init__()
        if (self.files is None) == (self.parts is None):
            raise ValueError(
                "a hub source needs either files or parts: give a list of paths, or for Ultra-FineWeb parts "
                f'such as "1-20" (en has {PARTS["en"]}, zh {PARTS["zh"]})'
            )
        if self.files is not None:
            _check_files(self.kind, self.files)
        elif self.repository != REPOSITORY:
            raise ValueError(
                f"parts names files of {REPOSITORY}, but repository is {self.repository!r}: give files"
            )
        if self.repository != REPOSITORY and self.revision == REVISION:
            raise ValueError(
                f"revision is one of {REPOSITORY}, but repository is {self.repository!r}: give a commit of it"
            )
        others = [name for name in self.file_names if not name.endswith(".parquet")]
        if others:
            raise ValueError(f"files of a hub source has {others[0]!r}: want parquet files (.parquet)")

    @property
    def file_names(self) -> list[str]:
        """Paths in the repository.

        Raises:
            ValueError: If `parts` is no list of part numbers.
        """
        if self.parts is not None:
            return part_files(self.language, self.parts)
        return self.files or []


@dataclass(frozen=True, kw_only=True)
class ShardsSource:
    """Documents that `python -m data.shards prepare` tokenized.

    Attributes:
        kind: Tells this source from the others.
        folder: The folder that was prepared.
        on_damaged_file: "stop" ends the run with the file's name where a document is not what was written;
            "skip" leaves that document out, for which every rank reads every document.
    """

    kind: Literal["shards"] = "shards"
    folder: str
    on_damaged_file: Literal["stop", "skip"] = "stop"


LeafSource: TypeAlias = ParquetSource | JsonlSource | TextSource | HubSource | ShardsSource


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """Documents of several sources, each read again and again at its own rate.

    Attributes:
        kind: Tells this source from the others.
        weights: Each source's share of the text, by its name; they need not add up to 1. Text is counted in
            characters, tokens of shards as four each.
        sources: The sources, by the same names.
    """

    kind: Literal["mixture"] = "mixture"
    weights: dict[str, float]
    sources: dict[str, LeafSource]

    def __post_init__(self) -> None:
        """Refuse weights that do not belong to the sources."""
        if not self.sources or set(self.weights) != set(self.sources):
            raise ValueError(
                f"weights of a mixture names {sorted(self.weights)}, but sources names "
                f"{sorted(self.sources)}: give each source one weight"
            )
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"weights.{name} of a mixture is {weight}: must be positive and finite")


Source: TypeAlias = ParquetSource | JsonlSource | TextSource | HubSource | ShardsSource | MixtureSource


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads.

    Attributes:
        tokenizer: Folder that holds a tokenizer.json, that file itself, or a model's name on the Hugging Face
            hub, such as "Qwen/Qwen3-0.6B-Base", with "@" and a revision if need be.
        train: Documents to train on. Those that data/sources/split.py holds out are left out,
            whatever the source.
        validation: Documents to validate on, or None for a run that never validates.
        validation_documents: "all" reads every document of `validation`; "held_out" only those that training
            leaves out, for a `validation` of the same files as `train`.
        packing: "concatenate" cuts the stream of documents every T tokens; "best_fit" lays whole documents
            into rows and pads at most 1%, cutting hardly any but those longer than a row; it needs 512 rows'
            worth of documents at a time, for which a step may wait unless they are shards. Validation
            concatenates, so that losses compare whatever the packing.
        shuffle_seed: Read the documents of `train` in an order drawn from this seed, another one each epoch;
            None for the order in which they lie. Validation is never shuffled.
        mask_documents: Whether tokens see only their own document. If not, rows are plain causal sequences.
        end_of_document: The token that closes each document; must be in the tokenizer's vocabulary.
        prefetch_batches: Micro-batches prepared ahead by a background thread; 0 for none and no thread.
    """

    tokenizer: str
    train: Source
    validation: Source | None = None
    validation_documents: Literal["all", "held_out"] = "all"
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    shuffle_seed: int | None = None
    mask_documents: bool = True
    end_of_document: str = "<|endoftext|>"
    prefetch_batches: int = 4

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        if self.prefetch_batches < 0:
            raise ValueError(
                f"prefetch_batches is {self.prefetch_batches}, must be 0 (no background thread) or more"
            )
