"""The data loaders of torchtitan's trainer, which its checkpoints can save."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan.components.dataloader import BaseDataLoader

from data.config import DataConfig
from data.loading.global_batch import gradient_accumulation_steps
from data.loading.held_out import HeldOutLoader
from data.loading.loader import DEFAULT_WINDOW_BATCHES, MIN_WINDOW_BATCHES, PackedLoader
from data.loading.packing import MicroBatch
from data.sources.held_out import open_held_out
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from errors import UserError

logger = logging.getLogger(__name__)

_STATE_KEY = "packed_loader"


class TitanLoader(BaseDataLoader):
    """Adapt a PackedLoader to torchtitan's checkpoints.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: PackedLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches, as `PackedLoader` does."""
        return iter(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the iterator's position as one string under one key, the same on all ranks.

        A distributed checkpoint flattens nested values and loads them into the existing state, one entry at a
        time; a single string is replaced whole.
        """
        return {_STATE_KEY: json.dumps(self.loader.state_dict(), sort_keys=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved position.

        Args:
            state_dict: The result of `state_dict` on any rank; an empty one leaves the position unchanged.

        Raises:
            UserError: It holds no position, or that of another source, tokenizer or packing.
        """
        if not state_dict:
            return
        if _STATE_KEY not in state_dict:
            raise UserError(
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
    """Build the training loader, which repeats `config.train`.

    Args:
        config: The `[data]` table.
        tokenizer: Tokenizes text.
        seq_len: Tokens per sequence, T.
        local_batch_size: Sequences per micro-batch.
        global_batch_size: Sequences per step, over all ranks and micro-steps.
        dp_rank: Index of this data-parallel rank.
        dp_world_size: Number of data-parallel ranks.

    Raises:
        UserError: A file is missing or damaged, or the batch sizes do not fit the number of ranks.
    """
    num_micro_batches = gradient_accumulation_steps(
        global_batch_size=global_batch_size, local_batch_size=local_batch_size, num_ranks=dp_world_size
    )
    if dp_rank == 0:
        _log_order(config, global_batch_size)
    loader = PackedLoader(
        open_source(
            config.train,
            tokenizer_fingerprint=tokenizer.fingerprint,
            split="train",
            shuffle_seed=config.shuffle_seed,
            log_skipped=dp_rank == 0,
        ),
        tokenizer,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        packing=config.packing,
        shuffle_seed=config.shuffle_seed,
        shuffle_window=config.shuffle_window,
        mask_documents=config.mask_documents,
        # a step takes all its micro-batches at once
        prefetch_batches=config.prefetch_batches and max(config.prefetch_batches, num_micro_batches),
    )
    return TitanLoader(loader)


def _log_order(config: DataConfig, global_batch_size: int) -> None:
    """Warn of training data that is not shuffled, or too little."""
    window = config.shuffle_window
    if config.shuffle_seed is None:
        logger.warning(
            "data.shuffle_seed is none: neither documents nor rows are shuffled, and training reads the "
            "files in order"
        )
    elif window is not None and window < MIN_WINDOW_BATCHES * global_batch_size:
        logger.warning(
            "data.shuffle_window is %d rows, less than %d times the global batch (%d): rows of one long "
            'document will fill much of a batch; set it to %d, or to "none" for %d times the global batch',
            window,
            MIN_WINDOW_BATCHES,
            global_batch_size,
            MIN_WINDOW_BATCHES * global_batch_size,
            DEFAULT_WINDOW_BATCHES,
        )


def build_validation_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    max_tokens: int | None,
    kept_in: Path,
    dp_rank: int,
    dp_world_size: int,
) -> HeldOutLoader:
    """Build the validation loader: one epoch of `config.validation` per iterator, equally long on all ranks.

    Args:
        config: The `[data]` table.
        tokenizer: Tokenizes text.
        seq_len: Tokens per sequence, T.
        local_batch_size: Sequences per micro-batch.
        max_tokens: Predict only a sample of this many tokens, over all ranks; None for all of them.
        kept_in: Folder where a sample of text is kept, shared by all ranks.
        dp_rank: Index of this data-parallel rank.
        dp_world_size: Number of data-parallel ranks.

    Raises:
        UserError: The config has no validation source, or a file is missing or damaged.
    """
    if config.validation is None:
        raise UserError(
            "data.validation is none, but the run validates: name held-out files, or turn validation off"
        )
    return HeldOutLoader(
        open_held_out(config, tokenizer, max_tokens=max_tokens, kept_in=kept_in, is_main_rank=dp_rank == 0),
        tokenizer,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        max_tokens=max_tokens,
        mask_documents=config.mask_documents,
        prefetch_batches=config.prefetch_batches,
    )
