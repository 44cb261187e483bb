"""In-context recall, plain and noisy: values of keys that a row has shown before."""

import torch
from torch import Tensor

from eval.mad.settings import Setting
from tokens import IGNORE_INDEX


def _randint(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)


def in_context_recall(
    generator: torch.Generator, setting: Setting, num_rows: int, *, is_training: bool
) -> tuple[Tensor, Tensor]:
    """Draw rows of L / 2 pairs of a key and its value, which is fixed within a row.

    The first half of the vocabulary without noise tokens are keys, the second half values, noise follows. A
    pair is noise, two tokens, with probability frac_noise, but for one pair at a random place; otherwise its
    key is uniform. Values of keys are uniform and independent, so that keys may share one. The last pair
    repeats one of the keys that the row has shown, each equally likely.

    Training predicts every next token. Testing predicts values of keys that an earlier pair has shown.

    Args:
        generator: Source of randomness; its device is that of the result.
        setting: vocab_size is that of all tokens, seq_len L, even.
        num_rows: Rows N.
        is_training: Whether targets are those of training.

    Returns:
        Inputs and targets `[N, L - 1]`, int64; the target is the next token or IGNORE_INDEX.
    """
    num_pairs, device = setting.seq_len // 2, generator.device
    num_tokens = setting.vocab_size - setting.num_noise_tokens
    num_keys = num_tokens // 2
    value_NK = num_keys + _randint(generator, num_tokens - num_keys, num_rows, num_keys)
    key_NP = _randint(generator, num_keys, num_rows, num_pairs)
    is_noise_NP = torch.rand(num_rows, num_pairs, generator=generator, device=device) < setting.frac_noise
    is_noise_NP.scatter_(1, _randint(generator, num_pairs, num_rows, 1), False)
    is_noise_NP[:, -1] = False
    # where the place without noise is the last pair's, all others may be noise: less than one row in 10^7
    is_noise_NP[:, 0] &= ~is_noise_NP[:, :-1].all(1)

    presented_NK = torch.zeros(num_rows, num_keys, device=device)
    shown_NP = (~is_noise_NP[:, :-1]).float()
    presented_NK.scatter_reduce_(1, key_NP[:, :-1], shown_NP, "amax")
    key_NP[:, -1:] = torch.multinomial(presented_NK, 1, generator=generator)

    row_NP2 = torch.stack((key_NP, value_NK.gather(1, key_NP)), dim=2)
    if setting.num_noise_tokens:
        noise_NP2 = num_tokens + _randint(generator, setting.num_noise_tokens, num_rows, num_pairs, 2)
        row_NP2 = torch.where(is_noise_NP.unsqueeze(2), noise_NP2, row_NP2)
    row_NL = row_NP2.flatten(1)
    if is_training:
        return row_NL[:, :-1], row_NL[:, 1:]

    # the first pair that shows a key; noise shows none
    pair_NP = torch.arange(num_pairs, device=device).expand(num_rows, -1)
    shown_at_NP = pair_NP.masked_fill(is_noise_NP, num_pairs)
    first_NK = torch.full_like(value_NK, num_pairs).scatter_reduce_(1, key_NP, shown_at_NP, "amin")
    is_scored_NP = ~is_noise_NP & (first_NK.gather(1, key_NP) < pair_NP)
    targets_NL = torch.full_like(row_NL, IGNORE_INDEX)
    targets_NL[:, 1::2] = torch.where(is_scored_NP, row_NP2[..., 1], IGNORE_INDEX)
    return row_NL[:, :-1], targets_NL[:, 1:]
