"""The rules of MAD's tasks, a row and a token at a time: what the vectorized generators are held against."""

import random
from collections.abc import Callable, Sequence

from eval.mad.settings import Setting

IGNORED = -100
Row = tuple[list[int], list[int]]


def recall_row(rng: random.Random, setting: Setting, is_training: bool) -> Row:
    num_noise = setting.num_noise_tokens
    tokens = list(range(setting.vocab_size))
    noise = tokens[len(tokens) - num_noise :]
    tokens = tokens[: len(tokens) - num_noise]
    keys, values = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    num_pairs = setting.seq_len // 2
    row: list[int] = []
    targets: list[int] = []
    value_of: dict[int, int] = {}
    never_noise = rng.randrange(num_pairs)
    for i in range(num_pairs - 1):
        if i != never_noise and rng.random() < setting.frac_noise:
            row += rng.choices(noise, k=2)
            targets += [IGNORED, IGNORED]
            continue
        key = rng.choice(keys)
        is_seen = key in value_of
        value = value_of.setdefault(key, rng.choice(values))
        row += [key, value]
        targets += [IGNORED, value if is_seen else IGNORED]
    probe = rng.choice(sorted(value_of))
    row += [probe, value_of[probe]]
    targets += [IGNORED, value_of[probe]]
    return row[:-1], row[1:] if is_training else targets[1:]


def fuzzy_row(rng: random.Random, setting: Setting, is_training: bool) -> Row:
    seq_len, pad = setting.seq_len, setting.vocab_size - 1
    keys, values = list(range(pad // 2)), list(range(pad // 2, pad))

    def draw_key() -> tuple[int, ...]:
        return tuple(rng.sample(keys, rng.randint(1, 3) if is_training else 3))

    def draw_value() -> tuple[int, ...]:
        return tuple(rng.sample(values, rng.randint(1, 3)))

    probe, probe_value = draw_key(), draw_value()
    num_probe = len(probe) + len(probe_value)
    place = rng.randrange(seq_len - 2 * num_probe)
    row: list[int] = []
    targets: list[int] = []
    value_of = {probe: probe_value}
    shown: set[tuple[int, ...]] = set()
    while len(row) < seq_len - num_probe - 6:
        key = probe if len(row) >= place and probe not in shown else draw_key()
        value = value_of.setdefault(key, draw_value())
        row += [*key, *value]
        targets += [IGNORED] * len(key)
        targets += value if key in shown else [IGNORED] * len(value)
        shown.add(key)
    row += [*probe, *probe_value]
    targets += [*[IGNORED] * len(probe), *probe_value]
    padding = seq_len + 1 - len(row)
    row, targets = [pad] * padding + row, [IGNORED] * padding + targets
    return row[:-1], row[1:] if is_training else targets[1:]


def copying_row(rng: random.Random, setting: Setting, is_training: bool) -> Row:
    num_copied, blank, copy = setting.num_copied, setting.vocab_size - 2, setting.vocab_size - 1
    tokens = [rng.randrange(blank) for _ in range(num_copied)]
    num_blanks = setting.seq_len - 2 * num_copied - 1
    before = [rng.randrange(num_copied) for _ in range(num_blanks)]
    row: list[int] = []
    for i, token in enumerate(tokens):
        row += [blank] * before.count(i) + [token]
    return row + [copy] + [blank] * num_copied, [IGNORED] * (num_copied + num_blanks + 1) + tokens


def compression_row(rng: random.Random, setting: Setting, is_training: bool) -> Row:
    last = setting.vocab_size - 1
    row = [rng.randrange(last) for _ in range(setting.seq_len - 1)] + [last]
    return row, row


def memorization_rows(value_of_key: Sequence[int]) -> Callable[[random.Random, Setting, bool], Row]:
    """The rule for one map of keys to values."""

    def row(rng: random.Random, setting: Setting, is_training: bool) -> Row:
        inputs: list[int] = []
        targets: list[int] = []
        for _ in range(setting.seq_len // 2):
            key = rng.randrange(len(value_of_key))
            inputs += [key, setting.vocab_size - 1]
            targets += [IGNORED, value_of_key[key]]
        return inputs, targets

    return row
