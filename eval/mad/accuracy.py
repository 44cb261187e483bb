"""The accuracy that MAD scores by."""

import torch
from torch import Tensor

from eval.mad.examples import Examples
from eval.mad.model import compute_logits
from tokens import IGNORE_INDEX


def macro_accuracy(predictions: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the mean over classes of the share of a class's targets that are predicted.

    As in torchmetrics 1.x, a class that is predicted but no target counts as 0; one that is neither does not
    count.

    Args:
        predictions: Tokens, any shape, int64.
        targets: Tokens, the same shape; IGNORE_INDEX is skipped.
        vocab_size: Number of classes V.

    Returns:
        A scalar, fp64.
    """
    is_scored = targets != IGNORE_INDEX
    predictions, targets = predictions[is_scored], targets[is_scored]
    num_targets = targets.bincount(minlength=vocab_size).double()
    num_hits = targets[predictions == targets].bincount(minlength=vocab_size).double()
    counts = (num_targets > 0) | (predictions.bincount(minlength=vocab_size) > 0)
    return (num_hits / num_targets.clamp(min=1.0)).sum() / counts.sum()


@torch.inference_mode()
def batch_accuracy(model: torch.nn.Module, examples: Examples, batch: int) -> float:
    """Return the mean over batches of the macro accuracy of each, as MAD logs and scores it.

    Args:
        model: Computes logits `[B, T, V]` of tokens `[B, T]`.
        examples: The rows.
        batch: Rows of a batch.
    """
    accuracies = []
    for inputs_BT, targets_BT in zip(*(x.split(batch) for x in examples), strict=True):
        logits_BTV = compute_logits(model, inputs_BT)
        accuracy = macro_accuracy(logits_BTV.argmax(-1), targets_BT, logits_BTV.shape[-1])
        accuracies.append(accuracy)
    return float(torch.stack(accuracies).mean())
