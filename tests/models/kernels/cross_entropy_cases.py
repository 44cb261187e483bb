"""Logits and labels, and their losses and gradient by PyTorch."""

import torch
from torch import Tensor

from tokens import IGNORE_INDEX

CASES = (1, 40, 512, 1024, 1100, 1531)
"""Numbers of columns: below, at and between multiples of a tile of 512."""


def make(num_columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return logits `[6, V]` with row maxima from -50 to 50, and labels, the first and last columns too."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, num_columns, generator=generator) + torch.arange(-50, 51, 20)[:, None]
    labels = torch.randint(0, num_columns, (6,), generator=generator)
    labels[0], labels[1], labels[2] = 0, num_columns - 1, IGNORE_INDEX
    return logits.to(device=device, dtype=dtype), labels.to(device)


def truth(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return losses and z-losses `[T, 2]` and the logits' gradient, in fp64."""
    return plain(logits.double(), labels, z_loss)


def plain(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return losses and z-losses `[T, 2]`, in fp32 at least, and the logits' gradient in their dtype."""
    leaf = logits.detach().requires_grad_()
    wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
    lse = wide.logsumexp(-1)
    is_valid = labels != IGNORE_INDEX
    target = wide.gather(1, torch.where(is_valid, labels, 0)[:, None])[:, 0]
    losses = torch.stack((lse - target, z_loss * lse.square()), 1) * is_valid[:, None]
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient
