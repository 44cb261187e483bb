"""Inputs of normalize_heads, and its outputs and gradients."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from models.attention.base import Rope, normalize_heads
from models.qwen3 import document_positions


@dataclass(frozen=True)
class Case:
    """Sizes of a test: `[B, T, H, K]`, documents of B = 1, and how x lies in memory."""

    batch_size: int
    num_tokens: int
    num_heads: int
    head_dim: int
    documents: tuple[int, ...] | None = None
    is_slice: bool = False
    rotates: bool = True
    gain: float = 1.0


CASES = [
    Case(2, 300, 3, 64),
    Case(1, 600, 2, 96, documents=(1, 200, 0, 399), is_slice=True),
    Case(1, 513, 4, 128, documents=(500, 13), gain=0.25),
    Case(3, 171, 1, 256, is_slice=True),
    Case(2, 256, 2, 128, rotates=False, is_slice=True, gain=0.25),
]


def make(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Rope | None]:
    """Return x, the gain, dy, and RoPE; rows of x have norms from 0 to about 30 times that of the others."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, case.num_tokens, case.num_heads, case.head_dim)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x[:, 1] *= 30.0
    x[:, 2] = 0.0
    gain = case.gain * (0.5 + torch.rand(case.head_dim, generator=generator, dtype=torch.float64))
    if case.is_slice:
        x = torch.cat((torch.full_like(x, float("nan")), x), dim=2)
    x, gain, dy = (each.to(device=device, dtype=dtype) for each in (x, gain, dy))
    if not case.rotates:
        return x[:, :, -case.num_heads :], gain, dy, None
    bounds = None
    if case.documents is not None:
        bounds = torch.tensor([0, *accumulate(case.documents)], dtype=torch.int32, device=device)
    positions = document_positions(case.num_tokens, bounds, torch.device(device))
    if case.batch_size == 3:  # a table for each row
        positions = positions + 100 * torch.arange(3, device=device)[:, None]
    return x[:, :, -case.num_heads :], gain, dy, Rope(positions, case.head_dim, 1e6)


def plain(x: Tensor, gain: Tensor, dy: Tensor, rope: Rope | None) -> dict[str, Tensor]:
    """Return y, dx and dgain by PyTorch."""
    norm = nn.RMSNorm(x.shape[-1], eps=1e-6)
    norm.weight = nn.Parameter(gain)
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    y = y if rope is None else rope(y)
    dx, dgain = torch.autograd.grad(y, (leaf, norm.weight), dy)
    return {"y": y.detach(), "dx": dx, "dgain": dgain}


def ours(x: Tensor, gain: Tensor, dy: Tensor, rope: Rope | None) -> dict[str, Tensor]:
    """Return y, dx and dgain by normalize_heads."""
    norm = nn.RMSNorm(x.shape[-1], eps=1e-6)
    norm.weight = nn.Parameter(gain)
    leaf = x.detach().requires_grad_()
    y = normalize_heads(leaf, norm, rope)
    dx, dgain = torch.autograd.grad(y, (leaf, norm.weight), dy)
    return {"y": y.detach(), "dx": dx, "dgain": dgain}


def truth(x: Tensor, gain: Tensor, dy: Tensor, rope: Rope | None) -> dict[str, Tensor]:
    """Return y, dx and dgain in fp64, by the same table of angles."""
    return plain(x.double(), gain.double(), dy.double(), rope)
