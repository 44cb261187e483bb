"""What the chunked mechanisms share: rows cut into chunks, documents within them, decays, unit vectors.

Letters: B batch, T tokens, H heads, K key width, V value width; N chunks of C tokens; J is 1 where a head's
decay is one number and K where every key channel has its own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunks(NamedTuple):
    """How the documents of a row lie in its chunks; the same for every head and every row of a batch.

    A state is handed from chunk to chunk: that of the document to which the last token of a chunk belongs.
    """

    size: int
    visible_NCC: Tensor  # token j is in i's document and not after i
    reads_NC: Tensor  # the token is in the document whose state the chunk is handed
    writes_NC: Tensor  # the token is in the document whose state the chunk hands on

    def split(self, x_BTH: Tensor) -> Tensor:
        """Cut `[B, T, H, ...]` into `[B, H, N, C, ...]`, at least fp32, the last padded with zeros."""
        x_BHT = x_BTH.to(torch.promote_types(x_BTH.dtype, torch.float32)).transpose(1, 2)
        tail = -x_BHT.shape[2] % self.size
        return F.pad(x_BHT, (0, 0) * (x_BHT.ndim - 3) + (0, tail)).unflatten(2, (-1, self.size))


def cut(like_BTH: Tensor, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """Cut a row into chunks.

    Args:
        like_BTH: Any tensor `[B, T, H, ...]` of it.
        cu_seqlens: Document bounds `[N + 1]`, int32, with B = 1; None for B rows of one document each.
        size: The most tokens of a chunk.

    Returns:
        The chunks; what the last one lacks counts to the last document, and must change no state.
    """
    num_tokens = like_BTH.shape[1]
    size = min(size, num_tokens)
    position_T = torch.arange(num_tokens - num_tokens % -size, device=like_BTH.device).clamp(
        max=num_tokens - 1
    )
    ids_T = torch.zeros_like(position_T)
    if cu_seqlens is not None:
        ids_T = torch.searchsorted(cu_seqlens.to(position_T.dtype), position_T, right=True)
    ids_NC = ids_T.unflatten(0, (-1, size))
    handed_N = torch.cat((ids_NC[:1, 0], ids_NC[:-1, -1]))
    causal_CC = torch.ones(size, size, dtype=torch.bool, device=ids_T.device).tril()
    return Chunks(
        size,
        (ids_NC[:, :, None] == ids_NC[:, None]) & causal_CC,
        ids_NC == handed_N[:, None],
        ids_NC == ids_NC[:, -1:],
    )


def join(x_BHNCV: Tensor, num_tokens: int) -> Tensor:
    """Undo Chunks.split: `[B, T, H, V]`."""
    return x_BHNCV.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)


class Decays(NamedTuple):
    """Factors, all of them at most 1, by which what is remembered fades within a chunk."""

    between_BHNCCJ: Tensor  # from token j to token i; 0 where i does not see j
    reading_BHNCJ: Tensor  # from the chunk's start to token i; 0 where i reads another document
    writing_BHNCJ: Tensor  # from token j to the chunk's end; 0 where j's document has ended
    passing_BHNJ: Tensor  # from the chunk's start to its end; 0 where the document has ended


def fade(g_BHNCJ: Tensor, chunks: Chunks) -> Decays:
    """Decays from the logarithms of every token's.

    Args:
        g_BHNCJ: Logarithm of the decay at each token `[B, H, N, C, J]`, at most 0.
        chunks: Of the row.
    """
    sums = g_BHNCJ.cumsum(3)
    reads, writes = chunks.reads_NC[..., None], chunks.writes_NC[..., None]
    # hidden pairs are masked before exp, where they could overflow
    between = (sums.unsqueeze(4) - sums.unsqueeze(3)).masked_fill(~chunks.visible_NCC[..., None], -torch.inf)
    return Decays(
        between.exp(),
        sums.exp() * reads,
        (sums[:, :, :, -1:] - sums).exp() * writes,
        sums[:, :, :, -1].exp() * reads[:, -1],
    )


def fading_scores(a_BHNCK: Tensor, b_BHNCK: Tensor, decays: Decays) -> Tensor:
    """Scores a_i.(decay from j to i * b_j) in a chunk, `[B, H, N, C, C]`; 0 where i does not see j."""
    between = decays.between_BHNCCJ
    if between.shape[-1] == 1:
        return (a_BHNCK @ b_BHNCK.mT) * between.squeeze(-1)
    return torch.einsum("...ik,...ijk->...ij", a_BHNCK, between * b_BHNCK.unsqueeze(3))


def unit(x: Tensor) -> Tensor:
    """Normalise the last dimension as fla does, x / sqrt(sum x^2 + 1e-6), in at least fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
