"""Selective copying: tokens between blanks, to be repeated in their order."""

import torch
from torch import Tensor

from eval.mad.settings import Setting
from tokens import IGNORE_INDEX


def selective_copying(generator: torch.Generator, setting: Setting, num_rows: int) -> tuple[Tensor, Tensor]:
    """Draw rows of M tokens with blanks before them, the copy token, and M blanks, where they are asked.

    The tokens are uniform and independent. Each of T - 2 M - 1 blanks is put before one of the M tokens,
    uniform and independent, so that the last token stands just before the copy token. Blank and copy token
    are V - 2 and V - 1.

    Args:
        generator: Source of randomness; its device is that of the result.
        setting: vocab_size is V, seq_len T, above 2 M + 1, num_copied M.
        num_rows: Rows N.

    Returns:
        Inputs and targets `[N, T]`, int64; targets before the last M positions are IGNORE_INDEX.
    """
    vocab_size, seq_len, num_copied = setting.vocab_size, setting.seq_len, setting.num_copied
    num_blanks = seq_len - 2 * num_copied - 1
    assert num_blanks > 0, "seq_len must be above 2 num_copied + 1"
    device = generator.device
    blank, copy = vocab_size - 2, vocab_size - 1
    tokens_NM = torch.randint(vocab_size - 2, (num_rows, num_copied), generator=generator, device=device)
    before_NB = torch.randint(num_copied, (num_rows, num_blanks), generator=generator, device=device)
    blanks_NM = torch.zeros_like(tokens_NM).scatter_add_(1, before_NB, torch.ones_like(before_NB))
    position_NM = blanks_NM.cumsum(1) + torch.arange(num_copied, device=device)
    inputs_NT = torch.full((num_rows, seq_len), blank, device=device)
    inputs_NT.scatter_(1, position_NM, tokens_NM)
    inputs_NT[:, num_copied + num_blanks] = copy
    targets_NT = torch.full_like(inputs_NT, IGNORE_INDEX)
    targets_NT[:, -num_copied:] = tokens_NM
    return inputs_NT, targets_NT
