"""What `data` gives to torchtitan's trainer: loaders that its checkpoints can save."""

import json
import math
from collections.abc import Iterator
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader

from data.config import DataConfig
from data.loading.loader import PackedLoader
from data.loading.packing import MicroBatch
from data.sources.open import open_source
from data.tokenizer import Tokenizer

_STATE_KEY = "packed_loader"


class TitanLoader(BaseDataLoader):
    """A PackedLoader as torchtitan's checkpoints want it."""

    def __init__(self, loader: PackedLoader) -> None:
        """Wrap a loader.

        Args:
            loader: Makes the batches and owns the position.
        """
        self.loader = loader

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches, as `PackedLoader` does."""
        return iter(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as one string under one key, the same on every rank.

        A distributed checkpoint takes nested values apart and loads them into what is there, one entry at a
        time; a single string is replaced whole.
        """
        return {_STATE_KEY: json.dumps(self.loader.state_dict(), sort_keys=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Args:
            state_dict: What `state_dict` returned on any rank; an empty one leaves the position as it is.

        Raises:
            ValueError: If there is no position in it, or it belongs to another source or tokenizer.
        """
        if not state_dict:
            return
        if _STATE_KEY not in state_dict:
            raise ValueError(
                f"the checkpoint's data state has no {_STATE_KEY!r} (it has {sorted(state_dict)}): "
                "it was written by another data loader"
            )
        self.loader.load_state_dict(json.loads(state_dict[_STATE_KEY]))

    def close(self) -> None:
        """End the background thread."""
        self.loader.close()


def build_dataloader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    global_batch_size: int,
    dp_rank: int,
    dp_world_size: int,
) -> TitanLoader:
    """Build the training loader, which reads `config.train` again and again.

    Args:
        config: What to read.
        tokenizer: Turns documents into tokens.
        seq_len: Tokens a sequence, T.
        local_batch_size: Sequences a micro-batch.
        global_batch_size: Sequences a step, over all ranks and micro-steps.
        dp_rank: This rank's index among the data-parallel ranks.
        dp_world_size: Number of data-parallel ranks.

    Raises:
        ValueError: If a file is missing or damaged, or the batch sizes do not fit the ranks.
    """
    num_microbatches = global_batch_size // (local_batch_size * dp_world_size)
    loader = PackedLoader(
        open_source(
            config.train,
            tokenizer_fingerprint=tokenizer.fingerprint,
            split="train",
            shuffle_seed=config.shuffle_seed,
            is_reporter=dp_rank == 0,
        ),
        tokenizer,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        packing=config.packing,
        mask_documents=config.mask_documents,
        # a step takes all its micro-batches at once
        prefetch_batches=config.prefetch_batches and max(config.prefetch_batches, num_microbatches),
    )
    return TitanLoader(loader)


def build_validation_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    max_tokens: int | None,
    dp_rank: int,
    dp_world_size: int,
) -> TitanLoader:
    """Build the validation loader: each iterator is one pass over `config.validation`, as long on every rank.

    Args:
        config: What to read.
        tokenizer: Turns documents into tokens.
        seq_len: Tokens a sequence, T.
        local_batch_size: Sequences a micro-batch.
        max_tokens: Read the first sequences that hold this many tokens, whatever the ranks; None for all.
        dp_rank: This rank's index among the data-parallel ranks.
        dp_world_size: Number of data-parallel ranks.

    Raises:
        ValueError: If the run names no validation set, or a file is missing or damaged.
    """
    if config.validation is None:
        raise ValueError(
            "data.validation is none, but the run validates: name held-out files, or switch validation off"
        )
    loader = PackedLoader(
        open_source(
            config.validation,
            tokenizer_fingerprint=tokenizer.fingerprint,
            split=config.validation_documents,
            is_reporter=dp_rank == 0,
        ),
        tokenizer,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        global_batch_size=local_batch_size * dp_world_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        mask_documents=config.mask_documents,
        repeat=False,
        max_sequences=None if max_tokens is None else math.ceil(max_tokens / seq_len),
        prefetch_batches=config.prefetch_batches,
    )
    return TitanLoader(loader)
