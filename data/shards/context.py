"""Mean context per token in the rows that training makes of a folder of shards.

The context of an input token is the number of tokens of its document before it in its row: what it can attend
to with document masking. It falls if documents are cut into more pieces; shuffling rows leaves rows as they
are, and with them the mean.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from data.config import ShardsSource
from data.loading.best_fit import BestFitPacker
from data.loading.packing import ConcatenatePacker, Document, PackedRow, Packer, PackerState
from data.loading.shard_rows import Packing, ShardRows
from data.sources.shard_format import read_manifest
from data.sources.shards import ShardDocuments


class MeanContext(NamedTuple):
    """Mean context per token of one packing.

    Attributes:
        packing: The packing.
        served: Mean over the rows that training serves, in tokens.
        in_order: Mean over the rows of the packer that reads documents one by one, without a shuffle of rows.
        num_rows: Number of these rows, from the start of an epoch in shuffled order.
        is_whole: Whether they are the whole epoch.
    """

    packing: Packing
    served: float
    in_order: float
    num_rows: int
    is_whole: bool


def mean_context(rows: Iterable[PackedRow]) -> float:
    """Return the mean, over the input tokens of rows, of the tokens of the same document before each.

    Args:
        rows: The rows; padding does not count.
    """
    total = num_tokens = 0
    for row in rows:
        left = row.seq_len
        for segment in row.segments:
            length = min(segment.stop - segment.start, left)
            total += length * (length - 1) // 2
            num_tokens += length
            left -= length
    return total / num_tokens if num_tokens else 0.0


def measure_context(folder: Path, seq_len: int, max_rows: int) -> Iterator[MeanContext]:
    """Measure the mean context of training documents for each packing, from their lengths alone.

    Args:
        folder: The prepared folder.
        seq_len: Tokens per row, T.
        max_rows: Measure about this many rows, or the whole epoch if it has fewer.

    Raises:
        UserError: The folder is incomplete or has no training document, or `seq_len` is below 1.
    """
    fingerprint = read_manifest(folder).settings["tokenizer"]["fingerprint"]
    source = ShardDocuments(
        ShardsSource(folder=str(folder)), tokenizer_fingerprint=fingerprint, split="train", shuffle_seed=0
    )
    packers: dict[Packing, Callable[[int, int], Packer]]
    packers = {"concatenate": ConcatenatePacker, "best_fit": BestFitPacker}
    start = PackerState(None, 0, {})
    for packing in get_args(Packing):
        served: list[PackedRow] = []
        is_whole = False
        for block in ShardRows(source, packing=packing, seq_len=seq_len, padding_id=0).blocks(start):
            served += [block.rows[index] for index in range(len(block.rows))]
            is_whole = block.ends_epoch
            if is_whole or len(served) >= max_rows:
                break
        packed = packers[packing](seq_len, 0).pack(_documents(source), start)
        in_order = (row for row, _ in itertools.islice(packed, None if is_whole else len(served)))
        yield MeanContext(packing, mean_context(served), mean_context(in_order), len(served), is_whole)


def _documents(source: ShardDocuments) -> Iterator[Document]:
    for row in source.read(repeat=False):
        if row.tokens is not None:
            yield Document(tokens=row.tokens, position=None, next_position=row.next_position, skipped={})
