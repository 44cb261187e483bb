"""Micro-batches for one rank, out of one global order of sequences, the same for any number of ranks.

Sequences have a global index. A step takes the next `global_batch_size` of them. With W ranks, b =
local_batch_size and micro-step m, rank w takes rows [m*W*b + w*b, m*W*b + (w + 1)*b) of the step's. Every
rank goes through the whole stream, and builds tensors for its own rows only: of prepared shards it reads the
lengths of all documents and the tokens of its own, of text it reads and tokenizes all, so that text serves
as many GPUs as one node's cores can feed.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

from data.loading.best_fit import BestFitPacker
from data.loading.packing import ConcatenatePacker, MicroBatch, PackedRow, Packer, collate, filler_row
from data.loading.prefetch import Prefetcher
from data.loading.stream import RowStream, StreamState
from data.sources.base import DocumentSource
from data.tokenizer import Tokenizer

_STATE_VERSION = 2


class PackedLoader:
    """One rank's micro-batches of packed documents, with a global state that resumes exactly.

    A training loader (`repeat=True`) never ends, and each iterator goes on where the last one stopped. A
    validation loader (`repeat=False`) starts over with each iterator and keeps every token: the last row is
    padded, and rows of padding even out the ranks, so that all of them get the same number of micro-batches.
    Padding is never a label.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        local_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        packing: Literal["concatenate", "best_fit"] = "concatenate",
        mask_documents: bool = True,
        repeat: bool = True,
        max_sequences: int | None = None,
        prefetch_batches: int = 4,
    ) -> None:
        """Check the sizes and set the position to the start; nothing is read yet.

        Args:
            source: The documents.
            tokenizer: Turns them into tokens.
            seq_len: Tokens a sequence, T.
            local_batch_size: Sequences a micro-batch, b.
            global_batch_size: Sequences a step, over all ranks and micro-steps.
            dp_rank: This rank's index among the data-parallel ranks.
            dp_world_size: Number of data-parallel ranks, W.
            packing: How documents become sequences (data/loading/packing.py, data/loading/best_fit.py).
            mask_documents: Whether tokens see only their own document.
            repeat: Whether to read the source again and again.
            max_sequences: End each iterator after this many sequences over all ranks; None for no limit.
            prefetch_batches: Micro-batches prepared ahead by a thread; 0 for none and no thread.

        Raises:
            ValueError: If a size is below 1, or the global batch does not divide evenly.
        """
        _check_sizes(seq_len, local_batch_size, global_batch_size, dp_rank, dp_world_size)
        padding = tokenizer.end_of_document_id
        packers: dict[str, Callable[[int, int], Packer]]
        packers = {"concatenate": ConcatenatePacker, "best_fit": BestFitPacker}
        packer = packers[packing](seq_len, padding)
        self._stream = RowStream(source, tokenizer, packer, repeat=repeat)
        self._filler = filler_row(seq_len, padding)
        self._rank_rows = (dp_rank * local_batch_size, dp_world_size * local_batch_size, local_batch_size)
        self._mask_documents = mask_documents
        self._repeat = repeat
        self._max_sequences = max_sequences
        self._prefetch_batches = prefetch_batches
        self._fingerprint = {
            "source": source.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "packing": packer.name,
        }
        self._state = StreamState()
        self._generation = 0
        self._prefetcher: Prefetcher[tuple[MicroBatch, StreamState]] | None = None

    @property
    def skipped(self) -> Mapping[str, int]:
        """Source rows skipped before the next sequence since the run began, by reason."""
        return self._state.skipped

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches; ends an earlier iterator of this loader.

        Returns:
            Inputs and labels as `data.loading.packing.collate` describes them, in pinned memory where CUDA is
            available.

        Raises:
            ValueError: If the source is damaged, or a whole epoch of it has no document.
        """
        self.close()
        generation = self._generation
        if not self._repeat:
            self._state = StreamState()
        pin_device = torch.cuda.current_device() if torch.cuda.is_available() else None
        rows = itertools.islice(self._stream.rows(self._state), self._max_sequences)
        produce = _Producer(rows, self._filler, self._rank_rows, self._mask_documents, pin_device)
        if not self._prefetch_batches:
            yield from self._consume(produce(), generation)
            return
        prefetcher = self._prefetcher = Prefetcher(produce, self._prefetch_batches)
        try:
            yield from self._consume(prefetcher, generation)
        finally:
            prefetcher.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last micro-batch taken from the iterator, the same on every rank.

        Rows that were prefetched but not taken are not part of it. The values are plain JSON and do not grow.
        """
        return {
            "version": _STATE_VERSION,
            "fingerprint": self._fingerprint,
            "position": self._state.to_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to a saved position; the next iterator starts there, with any number of ranks.

        Args:
            state_dict: What `state_dict` returned, on any rank.

        Raises:
            ValueError: If the position is of another source, tokenizer or packing, or this loader always
                starts over.
        """
        if not self._repeat:
            raise ValueError(
                "a loader with repeat=False starts over with each iterator: it has no position to load"
            )
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"the saved data position has version {state_dict.get('version')!r}, expected "
                f"{_STATE_VERSION}: load the checkpoint with the code that wrote it"
            )
        for part, mine in self._fingerprint.items():
            saved = state_dict["fingerprint"][part]
            if saved != mine:
                raise ValueError(
                    f"the saved data position belongs to another {part} (fingerprint {saved}, this run has "
                    f"{mine}): restore the {part}, or start another run.folder"
                )
        self.close()
        self._state = StreamState.from_dict(state_dict["position"])

    def close(self) -> None:
        """End the current iterator and its thread; the position stays, and a new iterator may follow."""
        self._generation += 1
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _consume(
        self, batches: Iterator[tuple[MicroBatch, StreamState]], generation: int
    ) -> Iterator[MicroBatch]:
        for batch, state in batches:
            self._state = state
            yield batch
            if generation != self._generation:
                return


class _Producer:
    """Makes one rank's micro-batches from a state on; knows no loader, so its thread keeps none alive."""

    def __init__(
        self,
        rows: Iterator[tuple[PackedRow, StreamState]],
        filler: PackedRow,
        rank_rows: tuple[int, int, int],
        mask_documents: bool,
        pin_device: int | None,
    ) -> None:
        self._rows = rows
        self._filler = filler
        self._first, self._group, self._count = rank_rows
        self._mask_documents = mask_documents
        self._pin_device = pin_device

    def __call__(self) -> Iterator[tuple[MicroBatch, StreamState]]:
        """Yield each micro-batch with the state after its group, one group being all ranks' rows."""
        if self._pin_device is not None:
            # A new thread would pin on device 0 and open a context there for every rank of the node.
            torch.cuda.set_device(self._pin_device)
        own: list[PackedRow] = []
        position = 0
        state = StreamState()
        for row, state in self._rows:
            if self._first <= position < self._first + self._count:
                own.append(row)
            position += 1
            if position == self._group:
                yield self._batch(own), state
                own, position = [], 0
        if position:
            yield self._batch(own + [self._filler] * (self._count - len(own))), state

    def _batch(self, rows: list[PackedRow]) -> MicroBatch:
        inputs, labels = collate(rows, mask_documents=self._mask_documents)
        if self._pin_device is None:
            return inputs, labels
        return {name: tensor.pin_memory() for name, tensor in inputs.items()}, labels.pin_memory()


def _check_sizes(
    seq_len: int, local_batch_size: int, global_batch_size: int, dp_rank: int, dp_world_size: int
) -> None:
    sizes = {
        "seq_len": seq_len,
        "local_batch_size": local_batch_size,
        "global_batch_size": global_batch_size,
        "dp_world_size": dp_world_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, must be at least 1")
    if not 0 <= dp_rank < dp_world_size:
        raise ValueError(
            f"dp_rank is {dp_rank}, must be from 0 to {dp_world_size - 1} with {dp_world_size} ranks"
        )
    rows = local_batch_size * dp_world_size
    if global_batch_size % rows:
        raise ValueError(
            f"global_batch_size ({global_batch_size}) must be a multiple of local_batch_size "
            f"({local_batch_size}) times {dp_world_size} data-parallel ranks: the next is "
            f"{(global_batch_size // rows + 1) * rows}"
        )
