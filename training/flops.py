"""Training FLOPs of micro-batches, by the lengths of their documents."""

from collections.abc import Mapping

import torch

from models.qwen3 import Qwen3


class FlopCounter:
    """Counts the FLOPs of micro-batches.

    Args:
        model: The model, sharded or not.
        seq_len: Length of the rows in tokens.
    """

    def __init__(self, model: Qwen3, seq_len: int) -> None:
        self._by_length = model.document_flops(seq_len)

    def count(self, inputs: Mapping[str, torch.Tensor]) -> float:
        """Count the FLOPs of a micro-batch of this rank; rows without "cu_seqlens" are one document each."""
        cu_seqlens = inputs.get("cu_seqlens")
        if cu_seqlens is None:
            return len(inputs["input"]) * float(self._by_length[-1])
        return float(self._by_length[cu_seqlens.diff()].sum())
