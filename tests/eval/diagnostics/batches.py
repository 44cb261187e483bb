"""Held-out batches made by hand."""

from collections.abc import Sequence

import torch

from data.loading.held_out import HeldOutBatch
from tokens import IGNORE_INDEX


def make_batch(lengths: Sequence[int], seq_len: int, *, masked: bool = True, seed: int = 0) -> HeldOutBatch:
    """Documents of these lengths, concatenated into rows as the loader does; the last row is padded."""
    generator = torch.Generator().manual_seed(seed)
    num = sum(lengths)
    num_rows = -(-(num - 1) // seq_len)
    padded = num_rows * seq_len + 1
    stream = torch.randint(1, 300, (padded,), generator=generator)
    document = torch.zeros(padded, dtype=torch.int64)
    document[:num] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    labels = stream[1:].clone()
    labels[num - 1 :] = IGNORE_INDEX
    starts = torch.tensor([0, *lengths]).cumsum(0)
    inputs = {"input": stream[:-1].reshape(num_rows, seq_len)}
    if masked:
        labels[starts[1:-1] - 1] = IGNORE_INDEX
        rows = torch.arange(0, padded, seq_len)
        bounds = torch.cat((starts[starts < padded - 1], rows)).unique().to(torch.int32)
        inputs = {"input": stream[:-1].reshape(1, -1), "cu_seqlens": bounds}
        labels = labels.reshape(1, -1)
    else:
        labels = labels.reshape(num_rows, seq_len)
    return HeldOutBatch(inputs, labels, document[1:].reshape(labels.shape), len(lengths), 0, 1.0)
