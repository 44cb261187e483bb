"""The examples of a setting: a training set, and a test set drawn after it from the same generator."""

from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from eval.mad.compression import compression
from eval.mad.fuzzy_recall import fuzzy_recall
from eval.mad.memorization import memorization
from eval.mad.recall import in_context_recall
from eval.mad.selective_copying import selective_copying
from eval.mad.settings import NUM_TEST_ROWS, Setting

# rows that are drawn at a time: bounds the memory of the longest rows
_BLOCK_ROWS = 1280


class Examples(NamedTuple):
    """Rows of a task.

    Attributes:
        inputs_NT: Tokens `[N, T]`, int64.
        targets_NT: The token to predict at each position `[N, T]`, int64; tokens.IGNORE_INDEX where none is.
    """

    inputs_NT: Tensor
    targets_NT: Tensor


def _draw(generator: torch.Generator, setting: Setting, num_rows: int, is_training: bool) -> Examples:
    match setting.task:
        case "in-context-recall" | "noisy-in-context-recall":
            return Examples(*in_context_recall(generator, setting, num_rows, is_training=is_training))
        case "fuzzy-in-context-recall":
            return Examples(*fuzzy_recall(generator, setting, num_rows, is_training=is_training))
        case "selective-copying":
            return Examples(*selective_copying(generator, setting, num_rows))
        case "compression":
            return Examples(*compression(generator, setting, num_rows))
        case "memorization":
            return Examples(*memorization(generator, setting, num_rows))
        case _:
            assert_never(setting.task)


def draw_examples(
    generator: torch.Generator, setting: Setting, num_rows: int, *, is_training: bool
) -> Examples:
    """Draw rows of a setting on the generator's device.

    Args:
        generator: Source of randomness, which it advances.
        setting: The sizes.
        num_rows: Rows N.
        is_training: Whether recall tasks have the targets (and fuzzy recall the motifs) of training.
    """
    blocks = [
        _draw(generator, setting, min(_BLOCK_ROWS, num_rows - start), is_training)
        for start in range(0, num_rows, _BLOCK_ROWS)
    ]
    return Examples(*(torch.cat(part) for part in zip(*blocks, strict=True)))


def draw_sets(setting: Setting, seed: int) -> tuple[Examples, Examples]:
    """Draw the training set and the test set of a setting on the CPU: equal on every machine.

    Args:
        setting: The sizes.
        seed: Seed of the draw.

    Returns:
        The training set, and the test set of NUM_TEST_ROWS rows.
    """
    generator = torch.Generator().manual_seed(seed)
    train = draw_examples(generator, setting, setting.num_train_rows, is_training=True)
    return train, draw_examples(generator, setting, NUM_TEST_ROWS, is_training=False)
