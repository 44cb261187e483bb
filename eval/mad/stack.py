"""Several models of one architecture as one, whose products are batched over its members.

The rows of all members are one batch: those of member n are the n-th part of it, so that attention, which
knows nothing of members, computes them all at once. What has parameters is replaced by a module with those of
all members.

Letters: N members, B rows of each, T tokens, D width, F outputs, K width of a norm, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.recurrent.base import Recurrence, RecurrentAttention, RowScan, ShortConvolution

# the gradient of a weight sums over all tokens of a member: in so many parts there are enough tiles for a GPU
_MAX_ROW_PARTS = 16
# torch's norm has a thread block for every row: too many where heads are narrow
_MIN_KERNEL_WIDTH = 64


def _stacked(members: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([member.detach() for member in members]))


class StackedLinear(nn.Module):
    """The linear maps of all members, each of its own rows.

    Args:
        members: The maps, all of one shape.
    """

    def __init__(self, members: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _stacked([member.weight for member in members])
        biases = [member.bias for member in members if member.bias is not None]
        self.bias = _stacked(biases) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N * B, ..., D]` to `[N * B, ..., F]`."""
        num_members, _, width = self.weight.shape
        num_parts = math.gcd(x.shape[0] // num_members, _MAX_ROW_PARTS)
        x_NPMD = x.reshape(num_members, num_parts, -1, width)
        y_NPMF = torch.matmul(x_NPMD, self.weight.mT.unsqueeze(1))
        if self.bias is not None:
            y_NPMF = y_NPMF + self.bias[:, None, None].to(y_NPMF.dtype)
        return y_NPMF.reshape(*x.shape[:-1], -1)


class StackedRMSNorm(nn.Module):
    """The norms of all members, each with its own gain.

    Args:
        members: The norms, all of one width.
    """

    def __init__(self, members: Sequence[nn.RMSNorm]) -> None:
        super().__init__()
        self.weight = _stacked([member.weight for member in members])
        assert members[0].eps is not None
        self.eps = members[0].eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[N * B, ..., K]`."""
        num_members, width = self.weight.shape
        if width < _MIN_KERNEL_WIDTH:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        else:
            normalized = F.rms_norm(x, (width,), eps=self.eps)
        gain = self.weight.view(num_members, *(1,) * (x.ndim - 1), width)
        return (normalized.unflatten(0, (num_members, -1)) * gain).flatten(0, 1)


class StackedEmbedding(nn.Module):
    """The embeddings of all members.

    Args:
        members: The embeddings, all of one shape.
    """

    def __init__(self, members: Sequence[nn.Embedding]) -> None:
        super().__init__()
        self.weight = _stacked([member.weight for member in members])

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up `[N * B, T]`, `[N * B, T, D]`."""
        num_members, vocab_size, _ = self.weight.shape
        first_N11 = torch.arange(num_members, device=tokens.device)[:, None, None] * vocab_size
        rows = tokens.unflatten(0, (num_members, -1)) + first_N11
        return F.embedding(rows.flatten(0, 1), self.weight.flatten(0, 1))


class StackedRecurrence(nn.Module):
    """A recurrent attention of all members: its own parameters, such as decay rates, are given row by row.

    Args:
        attention: The attention, with stacked modules and parameters `[N, ...]`.
        num_members: N.
    """

    def __init__(self, attention: RecurrentAttention, num_members: int) -> None:
        super().__init__()
        self.mixer = _Mixer(attention)
        self.num_members = num_members

    def forward(self, x_BTD: Tensor, *others: Any) -> Tensor:
        """See Attention.forward, with B = N * B and without documents."""
        num_rows = x_BTD.shape[0] // self.num_members
        by_row = {
            f"attention.{name}": parameter.repeat_interleave(num_rows, 0).unsqueeze(1)
            for name, parameter in self.mixer.attention.named_parameters(recurse=False)
        }
        context = _MemberScan(self.num_members)
        return torch.func.functional_call(self.mixer, by_row, (x_BTD, context))


class _Mixer(nn.Module):
    """Calls `mix` of a recurrent attention."""

    def __init__(self, attention: RecurrentAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x_BTD: Tensor, context: "_MemberScan") -> Tensor:
        return self.attention.mix(x_BTD, context)


class _MemberScan:
    """Scans the rows of all members from empty states, as ScanContext."""

    def __init__(self, num_members: int) -> None:
        self.num_members = num_members
        self.scan_rows = RowScan(None)

    def convolve(self, name: str, conv: ShortConvolution, x_BTC: Tensor) -> Tensor:
        """See ScanContext.convolve: members are channels, since each has its own weights."""
        x_NBTC = x_BTC.unflatten(0, (self.num_members, -1))
        y_BTC = self.scan_rows.convolve(name, conv, x_NBTC.permute(1, 2, 0, 3).flatten(2))
        return y_BTC.unflatten(2, (self.num_members, -1)).permute(2, 0, 1, 3).flatten(0, 1)

    def scan(self, recurrence: Recurrence, streams: tuple[Tensor, ...], *constants: Any) -> Tensor:
        """See ScanContext.scan: members are heads where a recurrence has parameters of its own."""
        if not constants:
            return self.scan_rows.scan(recurrence, streams)
        of_members = [x.unflatten(0, (self.num_members, -1)) for x in streams]
        as_heads = tuple(x.permute(1, 2, 0, *range(3, x.ndim)).flatten(2, 3) for x in of_members)
        # a parameter `[N * B, 1, H, ...]` has the same values in all rows of a member
        own = [
            x.unflatten(0, (self.num_members, -1))[:, 0, 0].flatten(0, 1) if isinstance(x, Tensor) else x
            for x in constants
        ]
        o = self.scan_rows.scan(recurrence, as_heads, *own).unflatten(2, (self.num_members, -1))
        return o.permute(2, 0, 1, *range(3, o.ndim)).flatten(0, 1)


def stack_modules(members: Sequence[nn.Module]) -> nn.Module:
    """Stack modules of one architecture; the first of them is changed and becomes the result.

    Args:
        members: N modules.

    Returns:
        A module that takes N * B rows where a member takes B. Its parameters are those of the members with a
        first dimension N; those of short convolutions have the channels of all members instead.
    """
    first = members[0]
    match first:
        case nn.Linear():
            return StackedLinear([each for each in members if isinstance(each, nn.Linear)])
        case nn.RMSNorm():
            return StackedRMSNorm([each for each in members if isinstance(each, nn.RMSNorm)])
        case nn.Embedding():
            return StackedEmbedding([each for each in members if isinstance(each, nn.Embedding)])
    for name, _ in list(first.named_children()):
        setattr(first, name, stack_modules([getattr(each, name) for each in members]))
    for name, _ in list(first.named_parameters(recurse=False)):
        stacked = _stacked([getattr(each, name) for each in members])
        if isinstance(first, ShortConvolution):
            stacked = nn.Parameter(stacked.detach().flatten(0, 1))
        setattr(first, name, stacked)
    return StackedRecurrence(first, len(members)) if isinstance(first, RecurrentAttention) else first


def named_stacked_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the parameters of a stack by their names in a member."""
    for name, parameter in model.named_parameters():
        yield name.replace(".mixer.attention.", "."), parameter


def split_members(stacked: Tensor, num_members: int) -> list[Tensor]:
    """Return each member's part of a stacked parameter or its gradient, which shares memory with it.

    A short convolution's keep their own shape `[C, W]`, all others lose the first dimension.
    """
    parts = stacked.detach().unflatten(0, (num_members, -1))
    return [
        parts[member].squeeze(0) if parts.shape[1] == 1 else parts[member] for member in range(num_members)
    ]
