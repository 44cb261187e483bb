"""The accuracy that MAD scores by."""

import torch
from torch import Tensor

from tokens import IGNORE_INDEX


def macro_accuracy(predictions_NM: Tensor, targets_NM: Tensor, vocab_size: int) -> Tensor:
    """Return the mean over classes of the share of a class's targets that are predicted, in each row.

    As in torchmetrics 1.x, a class that is predicted but no target counts as 0; one that is neither does not
    count. It does not wait for the device.

    Args:
        predictions_NM: Tokens `[N, M]`, int64.
        targets_NM: Tokens `[N, M]`, int64; IGNORE_INDEX is skipped.
        vocab_size: Number of classes V.

    Returns:
        Accuracies `[N]`, fp64; NaN where all targets are skipped.
    """
    is_scored = targets_NM != IGNORE_INDEX

    def count(tokens_NM: Tensor, is_counted: Tensor) -> Tensor:
        """Count the tokens of each class, `[N, V]`."""
        counts = torch.zeros(len(tokens_NM), vocab_size + 1, dtype=torch.float64, device=tokens_NM.device)
        classes = torch.where(is_counted, tokens_NM, vocab_size)
        return counts.scatter_add_(1, classes, torch.ones_like(classes, dtype=torch.float64))[:, :-1]

    num_targets = count(targets_NM, is_scored)
    num_hits = count(targets_NM, is_scored & (predictions_NM == targets_NM))
    is_class = (num_targets > 0) | (count(predictions_NM, is_scored) > 0)
    return (num_hits / num_targets.clamp(min=1.0)).sum(1) / is_class.sum(1)
