"""One rank's micro-batches, from a global order of sequences that does not depend on the number of ranks.

data/loading/global_batch.py divides the sequences among steps, micro-steps and ranks. Every rank iterates
over all rows but builds tensors of its own only. From prepared shards it reads the lengths of all documents
and the tokens of its own rows; from text it reads and tokenizes everything, so that text feeds only as many
GPUs as the cores of a node can tokenize for.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from data.fingerprint import check_fingerprint
from data.loading.global_batch import (
    balance_rows,
    gradient_accumulation_steps,
    rank_rows,
    rows_per_micro_step,
)
from data.loading.packing import MicroBatch, PackedRow, collate
from data.loading.prefetch import Prefetcher
from data.loading.rows import open_rows
from data.loading.shard_rows import Packing
from data.loading.stream import StreamState
from data.sources.base import DocumentSource
from data.tokenizer import Tokenizer
from errors import UserError

_STATE_VERSION = 3

# of the shuffle, where none is set; below the second, documents longer than a few rows show in a batch
DEFAULT_WINDOW_BATCHES = 16
MIN_WINDOW_BATCHES = 4


class PackedLoader:
    """One rank's micro-batches of packed documents; its state is the same on all ranks.

    It is infinite, epoch after epoch, and each iterator resumes where the previous one stopped.

    Args:
        source: The documents.
        tokenizer: Tokenizes text.
        seq_len: Tokens per sequence, T.
        local_batch_size: Sequences per micro-batch, b.
        global_batch_size: Sequences per step, over all ranks and micro-steps.
        dp_rank: Index of this data-parallel rank.
        dp_world_size: Number of data-parallel ranks, W.
        packing: Packer of documents into sequences (data/loading/packing.py, data/loading/best_fit.py).
        shuffle_seed: Seed of the shuffle of sequences (data/loading/row_shuffle.py); None for their order.
        shuffle_window: Sequences that are shuffled together, of sources other than shards; None for 16 times
            the global batch.
        mask_documents: Whether a token attends only to its own document.
        prefetch_batches: Micro-batches that a background thread prepares ahead; 0 for no thread.

    Raises:
        UserError: A size is below 1, or the global batch is not divisible by the micro-steps' rows.
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
        packing: Packing = "concatenate",
        shuffle_seed: int | None = None,
        shuffle_window: int | None = None,
        mask_documents: bool = True,
        prefetch_batches: int = 4,
    ) -> None:
        gradient_accumulation_steps(
            global_batch_size=global_batch_size, local_batch_size=local_batch_size, num_ranks=dp_world_size
        )
        self._stream = open_rows(
            source,
            tokenizer,
            packing=packing,
            seq_len=seq_len,
            shuffle_seed=shuffle_seed,
            window_rows=shuffle_window or DEFAULT_WINDOW_BATCHES * global_batch_size,
        )
        self._local_batch_size = local_batch_size
        self._rank, self._num_ranks = dp_rank, dp_world_size
        self._mask_documents = mask_documents
        self._prefetch_batches = prefetch_batches
        self._fingerprint = {
            "source": source.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "packing": self._stream.fingerprint,
        }
        self._state = StreamState()
        self._generation = 0
        self._prefetcher: Prefetcher[tuple[MicroBatch, StreamState]] | None = None

    @property
    def skipped(self) -> Mapping[str, int]:
        """Source rows skipped before the next sequence since the start of the run, by reason."""
        return self._state.num_skipped

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches; ends an earlier iterator of this loader.

        Returns:
            Inputs and labels as described at `data.loading.packing.collate`, in pinned memory if CUDA is
            available.

        Raises:
            UserError: The source is damaged, or a whole epoch holds no document.
        """
        self.close()
        generation = self._generation
        pin_device = torch.cuda.current_device() if torch.cuda.is_available() else None
        produce = _Producer(
            self._stream.rows(self._state),
            local_batch_size=self._local_batch_size,
            rank=self._rank,
            num_ranks=self._num_ranks,
            mask_documents=self._mask_documents,
            pin_device=pin_device,
        )
        if not self._prefetch_batches:
            yield from self._consume(produce(), generation)
            return
        prefetcher = self._prefetcher = Prefetcher(produce, self._prefetch_batches)
        try:
            yield from self._consume(prefetcher, generation)
        finally:
            prefetcher.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last micro-batch that the iterator yielded, the same on all ranks.

        Prefetched micro-batches do not count. The values are plain JSON of constant size.
        """
        return {
            "version": _STATE_VERSION,
            "fingerprint": self._fingerprint,
            "position": self._state.to_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved position, from which the next iterator resumes, on any number of ranks.

        Args:
            state_dict: The result of `state_dict` on any rank.

        Raises:
            UserError: The position belongs to another source, tokenizer or packing, or to another version.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            why = " (it was saved before rows were shuffled)" if version == 2 else ""
            raise UserError(
                f"the saved data position has version {version!r}, expected {_STATE_VERSION}{why}: resume "
                "the run with the code that wrote it, or start the data from its beginning in a branch: "
                "another run.folder, checkpoint.start_from, checkpoint.restart_data = true"
            )
        for part, fingerprint in self._fingerprint.items():
            saved = state_dict["fingerprint"][part]
            check_fingerprint(part, saved, fingerprint, log=self._rank == 0)
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
    """Build one rank's micro-batches; has no reference to the loader, which its thread would keep alive."""

    def __init__(
        self,
        rows: Iterator[tuple[PackedRow, StreamState]],
        *,
        local_batch_size: int,
        rank: int,
        num_ranks: int,
        mask_documents: bool,
        pin_device: int | None,
    ) -> None:
        self._rows = rows
        self._local_batch_size = local_batch_size
        self._rank, self._num_ranks = rank, num_ranks
        self._mask_documents = mask_documents
        self._pin_device = pin_device

    def __call__(self) -> Iterator[tuple[MicroBatch, StreamState]]:
        """Yield each micro-batch with the state after its micro-step, which spans the rows of all ranks."""
        if self._pin_device is not None:
            # a new thread would pin memory on device 0 and create a context there for every rank of the node
            torch.cuda.set_device(self._pin_device)
        size = rows_per_micro_step(self._local_batch_size, self._num_ranks)
        while micro_step := list(itertools.islice(self._rows, size)):
            rows = [row for row, _ in micro_step]
            _, state = micro_step[-1]
            yield self._collate([rows[index] for index in self._own(rows)]), state

    def _own(self, rows: Sequence[PackedRow]) -> Sequence[int]:
        """Return the rows of a micro-step that this rank takes."""
        if self._mask_documents:
            return balance_rows([row.num_pairs for row in rows], self._num_ranks)[self._rank]
        return rank_rows(self._local_batch_size, self._rank, self._num_ranks)

    def _collate(self, rows: list[PackedRow]) -> MicroBatch:
        inputs, labels = collate(rows, mask_documents=self._mask_documents)
        if self._pin_device is None:
            return inputs, labels
        return {name: tensor.pin_memory() for name, tensor in inputs.items()}, labels.pin_memory()
