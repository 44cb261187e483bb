"""The `[data]` table of a run: where documents come from and how they become sequences."""

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Documents in local parquet files, one a row.

    Attributes:
        kind: Tells this source from the others.
        files: Paths or globs, relative to the working directory, in this order; a glob's matches are sorted.
        text_column: The column that holds the text. Only this column is read.
    """

    kind: Literal["parquet"] = "parquet"
    files: list[str]
    text_column: str = "content"

    def __post_init__(self) -> None:
        """Refuse a source that names nothing."""
        if not self.files:
            raise ValueError("files of a parquet source is an empty list: name at least one path or glob")
        if not self.text_column:
            raise ValueError('text_column of a parquet source is "": name the column that holds the text')


Source: TypeAlias = ParquetSource


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads.

    Attributes:
        tokenizer: Folder that holds a tokenizer.json, or that file itself.
        train: Documents to train on.
        validation: Held-out documents, or None for a run that never validates.
        mask_documents: Whether tokens see only their own document. If not, rows are plain causal sequences.
        end_of_document: The token that closes each document; must be in the tokenizer's vocabulary.
        prefetch_batches: Micro-batches prepared ahead by a background thread; 0 for none and no thread.
    """

    tokenizer: str
    train: Source
    validation: Source | None = None
    mask_documents: bool = True
    end_of_document: str = "<|endoftext|>"
    prefetch_batches: int = 4

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        if self.prefetch_batches < 0:
            raise ValueError(
                f"prefetch_batches is {self.prefetch_batches}, must be 0 (no background thread) or more"
            )
