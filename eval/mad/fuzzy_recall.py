"""Fuzzy in-context recall: keys and values of one to three tokens, in rows of uneven pairs.

Letters: N rows, J pairs of a row, S tokens of a motif, P the probed pair.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from eval.mad.settings import Setting
from tokens import IGNORE_INDEX

MAX_MOTIF = 3


class _Motifs(NamedTuple):
    """Motifs: the first `size` of three distinct tokens."""

    tokens: Tensor  # [..., S]
    size: Tensor  # [...]


def fuzzy_recall(
    generator: torch.Generator, setting: Setting, num_rows: int, *, is_training: bool
) -> tuple[Tensor, Tensor]:
    """Draw rows of pairs of motifs: distinct tokens of the first half of the vocabulary, then of the second.

    Token V - 1 pads and is in neither half. A motif's size is uniform in 1, 2, 3, but that of keys is 3 in
    testing; a motif of a size is uniform. A row is made as in mad-lab:

    1. The probe, a key and its value, and a place, uniform below L - 2 |probe|, are drawn.
    2. While the row is shorter than L - |probe| - 6, a pair follows: the probe, if it has not occurred and
       the row has reached its place; otherwise a random key with its value, which is fixed within the row.
    3. The probe ends the row, and padding on the left makes it L + 1 tokens.

    A place close to the end may not be reached: then the last pair has a key that the row has not shown.
    Training predicts every next token, padding too. Testing predicts the values of keys that the row has
    shown before, and the last one.

    Args:
        generator: Source of randomness; its device is that of the result.
        setting: vocab_size is V, at least 8 (three keys, four values, padding), seq_len L.
        num_rows: Rows N.
        is_training: Whether motifs and targets are those of training.

    Returns:
        Inputs and targets `[N, L]`, int64; the target is the next token or IGNORE_INDEX.
    """
    vocab_size, seq_len = setting.vocab_size, setting.seq_len
    assert vocab_size >= 8, "there are no motifs of three tokens"
    num_keys, num_values = (vocab_size - 1) // 2, vocab_size - 1 - (vocab_size - 1) // 2
    min_pair = 2 if is_training else 1 + MAX_MOTIF
    num_pairs = -(-seq_len // min_pair)
    key = _draw_motifs(generator, num_keys, 1 if is_training else MAX_MOTIF, num_rows, num_pairs + 1)
    value = _draw_motifs(generator, num_values, 1, num_rows, num_pairs + 1)
    value = _Motifs(value.tokens + num_keys, value.size)
    first_NJ = _first_with_the_same(key, num_keys)
    # pair 0 is the probe, so that a key that happens to be its own gets its value
    value = _Motifs(
        value.tokens.gather(1, first_NJ.unsqueeze(2).expand_as(value.tokens)), value.size.gather(1, first_NJ)
    )
    return _assemble(generator, key, value, first_NJ, vocab_size, seq_len, is_training)


def _assemble(
    generator: torch.Generator,
    key: _Motifs,
    value: _Motifs,
    first_NJ: Tensor,
    vocab_size: int,
    seq_len: int,
    is_training: bool,
) -> tuple[Tensor, Tensor]:
    """Place pairs behind one another, and the probe (pair 0) among them and at the end."""
    size_NJ = key.size + value.size
    probe_N1, size_NJ = size_NJ[:, :1], size_NJ[:, 1:]
    limit_N1 = seq_len - 2 * probe_N1
    fraction_N1 = torch.rand(limit_N1.shape, generator=generator, device=limit_N1.device, dtype=torch.float64)
    place_N1 = (fraction_N1 * limit_N1).long()
    end_N1 = seq_len - probe_N1 - 2 * MAX_MOTIF
    start_NJ = size_NJ.cumsum(1) - size_NJ

    # the probe goes before pair `at`, unless its key has occurred by chance before, or the row ends before
    pair_NJ = torch.arange(size_NJ.shape[1], device=size_NJ.device).expand_as(size_NJ)
    is_probe_NJ = first_NJ[:, 1:] == 0
    at_N1 = (start_NJ < place_N1).sum(1, keepdim=True)
    has_occurred_N1 = (is_probe_NJ & (pair_NJ < at_N1)).any(1, keepdim=True)
    at_start_N1 = (size_NJ * (pair_NJ < at_N1)).sum(1, keepdim=True)
    is_inserted_N1 = ~has_occurred_N1 & (at_start_N1 < end_N1)
    start_NJ = start_NJ + probe_N1 * (is_inserted_N1 & (pair_NJ >= at_N1))

    is_placed_NJ = start_NJ < end_N1
    length_N1 = (size_NJ * is_placed_NJ).sum(1, keepdim=True) + probe_N1 * is_inserted_N1
    # seen before: in an earlier pair of the row, or as the probe that was inserted
    first_in_row_NJ = _first_but_probe(is_probe_NJ, first_NJ, pair_NJ)
    is_seen_NJ = (first_in_row_NJ < pair_NJ) | (is_probe_NJ & is_inserted_N1 & (pair_NJ >= at_N1))

    row = _Row(seq_len + 1, pad=vocab_size - 1, num_rows=len(length_N1), device=length_N1.device)
    padding_N1 = seq_len + 1 - length_N1 - probe_N1
    pairs = _Motifs(key.tokens[:, 1:], key.size[:, 1:]), _Motifs(value.tokens[:, 1:], value.size[:, 1:])
    probe = _Motifs(key.tokens[:, :1], key.size[:, :1]), _Motifs(value.tokens[:, :1], value.size[:, :1])
    row.write(*pairs, padding_N1 + start_NJ, is_placed_NJ, is_seen_NJ)
    never_N1 = torch.zeros_like(is_inserted_N1)
    row.write(*probe, padding_N1 + at_start_N1, is_inserted_N1, never_N1)
    row.write(*probe, padding_N1 + length_N1, ~never_N1, ~never_N1)
    tokens_NT, targets_NT = row.tokens[:, :-1], row.targets[:, :-1]
    return tokens_NT[:, :-1], (tokens_NT if is_training else targets_NT)[:, 1:]


class _Row:
    """Rows of tokens and targets that motifs are written into.

    Args:
        length: Tokens of a row.
        pad: The token of places that nothing is written to.
        num_rows: Rows N.
        device: Device of the rows.
    """

    def __init__(self, length: int, *, pad: int, num_rows: int, device: torch.device) -> None:
        # the last column takes what is not written
        self.tokens = torch.full((num_rows, length + 1), pad, device=device)
        self.targets = torch.full_like(self.tokens, IGNORE_INDEX)

    def write(
        self, key: _Motifs, value: _Motifs, start_NJ: Tensor, is_placed_NJ: Tensor, is_scored_NJ: Tensor
    ) -> None:
        """Write pairs at their starts, all `[N, J]`; values of those that are scored become targets."""
        for motifs, begin_NJ in ((key, start_NJ), (value, start_NJ + key.size)):
            offset_S = torch.arange(MAX_MOTIF, device=start_NJ.device)
            is_there_NJS = (offset_S < motifs.size.unsqueeze(2)) & is_placed_NJ.unsqueeze(2)
            position_NJS = (begin_NJ.unsqueeze(2) + offset_S).where(
                is_there_NJS, torch.tensor(self.tokens.shape[1] - 1, device=start_NJ.device)
            )
            self.tokens.scatter_(1, position_NJS.flatten(1), motifs.tokens.flatten(1))
            if motifs is value:
                targets_NJS = motifs.tokens.where(
                    is_scored_NJ.unsqueeze(2), torch.tensor(IGNORE_INDEX, device=start_NJ.device)
                )
                self.targets.scatter_(1, position_NJS.flatten(1), targets_NJS.flatten(1))


def _draw_motifs(
    generator: torch.Generator, num_tokens: int, min_size: int, num_rows: int, num_pairs: int
) -> _Motifs:
    """Draw three distinct tokens below num_tokens, uniform, and a size of at least min_size."""
    device, shape = generator.device, (num_rows, num_pairs)
    # an index among the tokens that are left becomes a token by skipping those that are taken
    first = torch.randint(num_tokens, shape, generator=generator, device=device)
    second = torch.randint(num_tokens - 1, shape, generator=generator, device=device)
    second = second + (second >= first)
    third = torch.randint(num_tokens - 2, shape, generator=generator, device=device)
    third = third + (third >= torch.minimum(first, second))
    third = third + (third >= torch.maximum(first, second))
    size = torch.randint(min_size, MAX_MOTIF + 1, shape, generator=generator, device=device)
    return _Motifs(torch.stack((first, second, third), dim=2), size)


def _first_with_the_same(motifs: _Motifs, num_tokens: int) -> Tensor:
    """Return the index of the first pair of the row with the same motif, `[N, J]`."""
    offset_S = torch.arange(MAX_MOTIF, device=motifs.size.device)
    digits = (motifs.tokens + 1) * (offset_S < motifs.size.unsqueeze(2))
    code_NJ = (digits * (num_tokens + 1) ** offset_S).sum(2)
    code_NJ, order_NJ = code_NJ.sort(dim=1, stable=True)
    is_new_NJ = torch.ones_like(code_NJ, dtype=torch.bool)
    is_new_NJ[:, 1:] = code_NJ[:, 1:] != code_NJ[:, :-1]
    # equal motifs are neighbors in the order of their pairs: the last new one is the first of them
    rank_NJ = torch.arange(code_NJ.shape[1], device=code_NJ.device).where(is_new_NJ, 0 * code_NJ)
    first_NJ = order_NJ.gather(1, rank_NJ.cummax(1).values)
    return torch.empty_like(first_NJ).scatter_(1, order_NJ, first_NJ)


def _first_but_probe(is_probe_NJ: Tensor, first_NJ: Tensor, pair_NJ: Tensor) -> Tensor:
    """Return the first pair of the row with the same key, leaving out pair 0, the drawn probe."""
    own_NJ = first_NJ[:, 1:] - 1
    first_chance_N1 = pair_NJ.masked_fill(~is_probe_NJ, pair_NJ.shape[1]).amin(1, keepdim=True)
    return torch.where(is_probe_NJ, first_chance_N1, own_NJ)
