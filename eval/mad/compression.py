"""Compression: all tokens of a row from the state of its last one."""

import torch
from torch import Tensor

from eval.mad.settings import Setting


def compression(generator: torch.Generator, setting: Setting, num_rows: int) -> tuple[Tensor, Tensor]:
    """Draw rows of tokens, uniform and independent, that end with the compression token, V - 1.

    Args:
        generator: Source of randomness; its device is that of the result.
        setting: vocab_size is V, seq_len T.
        num_rows: Rows N.

    Returns:
        Inputs and targets `[N, T]`, int64: the same tokens.
    """
    last, shape = setting.vocab_size - 1, (num_rows, setting.seq_len)
    inputs_NT = torch.randint(last, shape, generator=generator, device=generator.device)
    inputs_NT[:, -1] = last
    return inputs_NT, inputs_NT.clone()
