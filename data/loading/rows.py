"""The rows of a loader: the documents of a source packed, and served in order or shuffled."""

from collections.abc import Callable, Iterator
from typing import Protocol

from data.loading.best_fit import BestFitPacker
from data.loading.packing import ConcatenatePacker, PackedRow, Packer
from data.loading.row_shuffle import LAYOUT_WINDOW_ROWS, RowShuffle
from data.loading.shard_rows import Packing, ShardRows
from data.loading.stream import RowStream, StreamState
from data.sources.base import DocumentSource
from data.sources.shards import ShardDocuments
from data.tokenizer import Tokenizer


class ResumableRows(Protocol):
    """Rows of T + 1 tokens, each with the state after it."""

    @property
    def fingerprint(self) -> str:
        """Name of packing and order; a saved state is valid for rows of the same one."""
        ...

    def rows(self, start: StreamState) -> Iterator[tuple[PackedRow, StreamState]]:
        """Yield each row from a state on, with the state of the next row.

        Args:
            start: State of the first row.

        Raises:
            UserError: The source is damaged, or changed since the state was saved.
        """
        ...


def open_rows(
    source: DocumentSource,
    tokenizer: Tokenizer,
    *,
    packing: Packing,
    seq_len: int,
    shuffle_seed: int | None,
    window_rows: int,
) -> ResumableRows:
    """Pack a source's documents into rows, epoch after epoch.

    Args:
        source: The documents.
        tokenizer: Tokenizes text.
        packing: Packer of documents into rows.
        seq_len: Tokens per row, T.
        shuffle_seed: Seed of the shuffle of rows; None for their order.
        window_rows: Rows that are shuffled together, of sources other than shards.

    Raises:
        UserError: `seq_len` is below 1.
    """
    padding_id = tokenizer.end_of_document_id
    packers: dict[str, Callable[[int, int], Packer]]
    packers = {"concatenate": ConcatenatePacker, "best_fit": BestFitPacker}
    in_order = RowStream(source, tokenizer, packers[packing](seq_len, padding_id))
    if shuffle_seed is None:
        return in_order
    name = f"{packing} into rows of {seq_len}"
    if isinstance(source, ShardDocuments):
        laid_out = ShardRows(source, packing=packing, seq_len=seq_len, padding_id=padding_id)
        return RowShuffle(laid_out, packing=name, seed=shuffle_seed, window_rows=LAYOUT_WINDOW_ROWS)
    return RowShuffle(in_order, packing=name, seed=shuffle_seed, window_rows=window_rows)
