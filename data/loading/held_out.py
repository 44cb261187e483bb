"""One rank's micro-batches of held-out documents, each label with the number of its document.

Rows are concatenated documents, in order, whatever the packing of training, so that losses are comparable
across packings: a document that does not fit into its row continues in the next one, where its context starts
anew. The last row is padded, and rows of padding give every rank equally many micro-batches. Every token but
the first (with document masking, but the first of each document) is a label exactly once over all ranks.

A limit of tokens takes rows at even distances: of N rows the middle one of each of K equal parts (systematic
sampling: Cochran, Sampling Techniques, 3rd edition 1977, chapter 8). A long document, whose tokens have much
in common, then counts as much as in the whole set, while a sample of whole documents has all of it or
nothing; and a token is predicted from the same context as without the limit.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from data.loading.global_batch import rank_rows, rows_per_micro_step
from data.loading.packing import ConcatenatePacker, Document, PackedRow, PackerState, collate, padding_row
from data.loading.prefetch import Prefetcher
from data.loading.stream import tokenize
from data.sources.base import DocumentSource, Position, TokenSequence
from data.tokenizer import Tokenizer


class HeldOutBatch(NamedTuple):
    """A micro-batch; its tensors are in pinned memory if CUDA is available.

    Attributes:
        inputs: Ids and document boundaries, as `data.loading.packing.collate` returns them.
        labels: Ids to predict, int64, of the shape of the input ids; IGNORE_INDEX is no label.
        documents: Number of each label's document, from 0 over all ranks, int64, of the same shape.
        num_documents: Documents up to this micro-batch's last row on any rank, the same on all ranks.
        num_cut_documents: Those of them that do not fit into one row.
        fraction: Approximate share of the documents up to there, from 0 to 1.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    documents: torch.Tensor
    num_documents: int
    num_cut_documents: int
    fraction: float


class HeldOutLoader:
    """One rank's micro-batches of one pass over held-out documents; restarts with each iterator.

    Args:
        source: The documents.
        tokenizer: Tokenizes text.
        seq_len: Tokens per row, T.
        local_batch_size: Rows per micro-batch, b.
        dp_rank: Index of this data-parallel rank.
        dp_world_size: Number of data-parallel ranks.
        max_tokens: Take evenly spaced rows with this many tokens in all, rounded up to a whole row; None for
            all rows.
        mask_documents: Whether a token attends only to its own document.
        prefetch_batches: Micro-batches that a background thread prepares ahead; 0 for no thread.

    Raises:
        UserError: A size is below 1.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        local_batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        max_tokens: int | None = None,
        mask_documents: bool = True,
        prefetch_batches: int = 0,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._max_rows = None if max_tokens is None else math.ceil(max_tokens / seq_len)
        self._packer = ConcatenatePacker(seq_len, tokenizer.end_of_document_id)
        self._padding_row = padding_row(seq_len, tokenizer.end_of_document_id)
        self._rank_rows = rank_rows(local_batch_size, dp_rank, dp_world_size)
        self._micro_step_rows = rows_per_micro_step(local_batch_size, dp_world_size)
        self._mask_documents = mask_documents
        self._prefetch_batches = prefetch_batches

    def __iter__(self) -> Iterator[HeldOutBatch]:
        """Yield this rank's micro-batches, from the start.

        Raises:
            UserError: The source is damaged.
        """
        pin_device = torch.cuda.current_device() if torch.cuda.is_available() else None
        if not self._prefetch_batches:
            yield from self._produce(pin_device)
            return
        prefetcher = Prefetcher(partial(self._produce, pin_device), self._prefetch_batches)
        try:
            yield from prefetcher
        finally:
            prefetcher.close()

    def _produce(self, pin_device: int | None) -> Iterator[HeldOutBatch]:
        if pin_device is not None:
            # a new thread would pin memory on device 0 and create a context there for every rank of the node
            torch.cuda.set_device(pin_device)
        num_documents = 0
        cut: set[int] = set()
        rows = self._rows()
        while step_rows := list(itertools.islice(rows, self._micro_step_rows)):
            last = max((_last_document(row) for row in step_rows), key=lambda each: each.number)
            num_documents = max(num_documents, 1 + last.number)
            cut |= {number for row in step_rows for number in _continued(row)}
            fraction = self._source.progress(last.next_position)
            step_rows += [self._padding_row] * (self._micro_step_rows - len(step_rows))
            own = [step_rows[index] for index in self._rank_rows]
            inputs, labels = collate(own, mask_documents=self._mask_documents)
            documents = torch.from_numpy(np.stack([_document_of_label(row) for row in own]))
            batch = HeldOutBatch(
                inputs, labels, documents.reshape(labels.shape), num_documents, len(cut), fraction
            )
            yield batch if pin_device is None else _pin(batch)

    def _rows(self) -> Iterator[PackedRow]:
        rows = (row for row, _ in self._packer.pack(self._documents(), PackerState(None, 0, {})))
        if self._max_rows is None:
            return rows
        num_tokens = sum(len(document.tokens) for document in self._documents())
        chosen = evenly_spaced(math.ceil((num_tokens - 1) / self._seq_len), self._max_rows)
        return itertools.compress(rows, chosen)

    def _documents(self) -> Iterator[Document]:
        number = 0
        for row, tokens in tokenize(self._source.read(repeat=False), self._tokenizer):
            if tokens is not None:
                numbered = _NumberedTokens(number, row.next_position, tokens)
                yield Document(tokens=numbered, position=None, next_position=row.next_position, skipped={})
                number += 1


def evenly_spaced(num_rows: int, max_rows: int) -> np.ndarray:
    """Choose rows at even distances: the middle one of each of K equal parts, or all of at most K rows.

    Args:
        num_rows: Number of rows N.
        max_rows: Number of rows to choose K.

    Returns:
        Whether each row is chosen, bool `[N]`.
    """
    count = min(num_rows, max_rows)
    chosen = np.zeros(num_rows, dtype=bool)
    chosen[(2 * np.arange(count) + 1) * num_rows // (2 * max(count, 1))] = True
    return chosen


class _NumberedTokens:
    """Tokens of a document that know its number and the position after it."""

    def __init__(self, number: int, next_position: Position, tokens: TokenSequence) -> None:
        self.number, self.next_position = number, next_position
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, which: slice, /) -> np.ndarray:
        return self._tokens[which]


def _numbered(tokens: TokenSequence) -> _NumberedTokens:
    assert isinstance(tokens, _NumberedTokens)
    return tokens


def _last_document(row: PackedRow) -> _NumberedTokens:
    *_, last = row.segments
    return _numbered(last.tokens)


def _continued(row: PackedRow) -> list[int]:
    """Return the numbers of documents whose tokens are predicted without those of an earlier row."""
    # a single token is the last one of the earlier row, and only an input
    return [
        _numbered(each.tokens).number for each in row.segments if each.start and each.stop - each.start > 1
    ]


def _document_of_label(row: PackedRow) -> np.ndarray:
    """Return the number of the document of each label, int64 `[T]`; 0 for padding."""
    lengths = [segment.stop - segment.start for segment in row.segments]
    numbers = np.zeros(row.seq_len + 1, dtype=np.int64)
    numbers[: sum(lengths)] = np.repeat([_numbered(each.tokens).number for each in row.segments], lengths)
    return numbers[1:]


def _pin(batch: HeldOutBatch) -> HeldOutBatch:
    inputs = {name: tensor.pin_memory() for name, tensor in batch.inputs.items()}
    labels, documents = batch.labels.pin_memory(), batch.documents.pin_memory()
    return batch._replace(inputs=inputs, labels=labels, documents=documents)
