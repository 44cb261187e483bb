"""Memorization: the values of keys by a map that no row shows, the same in all rows and runs."""

import torch
from torch import Tensor

from eval.mad.settings import Setting
from tokens import IGNORE_INDEX

_MAP_SEED = 12345


def value_of_key(vocab_size: int) -> Tensor:
    """Return the map of a vocabulary, whose last token is neither key nor value.

    Args:
        vocab_size: Vocabulary V.

    Returns:
        The value of each of (V - 1) // 2 keys, int64, on the CPU; no two keys have the same one.
    """
    generator = torch.Generator().manual_seed(_MAP_SEED)
    num_keys, num_tokens = (vocab_size - 1) // 2, vocab_size - 1
    return num_keys + torch.randperm(num_tokens - num_keys, generator=generator)[:num_keys]


def memorization(generator: torch.Generator, setting: Setting, num_rows: int) -> tuple[Tensor, Tensor]:
    """Draw rows of pairs of a key, uniform and independent, and the token V - 1, where its value is asked.

    Args:
        generator: Source of randomness; its device is that of the result.
        setting: vocab_size is V, seq_len T, even.
        num_rows: Rows N.

    Returns:
        Inputs and targets `[N, T]`, int64; targets at keys are IGNORE_INDEX.
    """
    device = generator.device
    values = value_of_key(setting.vocab_size).to(device)
    keys_NP = torch.randint(len(values), (num_rows, setting.seq_len // 2), generator=generator, device=device)
    inputs_NP2 = torch.stack((keys_NP, torch.full_like(keys_NP, setting.vocab_size - 1)), dim=2)
    targets_NP2 = torch.stack((torch.full_like(keys_NP, IGNORE_INDEX), values[keys_NP]), dim=2)
    return inputs_NP2.flatten(1), targets_NP2.flatten(1)
