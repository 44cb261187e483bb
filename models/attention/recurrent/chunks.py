"""Chunking of rows for the recurrences: document boundaries in chunks, decays, L2 normalization.

A chunked recurrence passes one state from chunk to chunk: that of the document to which the last token of a
chunk belongs.

Letters: B batch, T tokens, H heads, K key width, V value width; N chunks of C tokens; J is 1 where a head has
one decay and K where every key channel has its own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunks(NamedTuple):
    """The chunks of a row and its document boundaries; the same for all heads and all rows of a batch.

    Attributes:
        size: Tokens C of a chunk.
        is_visible_NCC: Token j is in token i's document and not after i.
        is_in_first_NC: The token belongs to the document of the chunk's initial state.
        is_in_last_NC: The token belongs to the document of the chunk's final state.
    """

    size: int
    is_visible_NCC: Tensor
    is_in_first_NC: Tensor
    is_in_last_NC: Tensor

    def split(self, x_BTH: Tensor) -> Tensor:
        """Reshape `[B, T, H, ...]` to `[B, H, N, C, ...]`, at least fp32, zero-padded at the end."""
        x_BHT = x_BTH.to(torch.promote_types(x_BTH.dtype, torch.float32)).transpose(1, 2)
        tail = -x_BHT.shape[2] % self.size
        return F.pad(x_BHT, (0, 0) * (x_BHT.ndim - 3) + (0, tail)).unflatten(2, (-1, self.size))


def make_chunks(like_BTH: Tensor, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """Compute the chunks of a row.

    Args:
        like_BTH: Any tensor `[B, T, H, ...]` of the row.
        cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1; None for B rows of one document each.
        size: Largest number of tokens of a chunk.

    Returns:
        The chunks; the last one's padding counts as part of the last document, and must not change a state.
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
    first_N = torch.cat((ids_NC[:1, 0], ids_NC[:-1, -1]))
    causal_CC = torch.ones(size, size, dtype=torch.bool, device=ids_T.device).tril()
    return Chunks(
        size,
        (ids_NC[:, :, None] == ids_NC[:, None]) & causal_CC,
        ids_NC == first_N[:, None],
        ids_NC == ids_NC[:, -1:],
    )


def merge_chunks(x_BHNCV: Tensor, num_tokens: int) -> Tensor:
    """Undo Chunks.split: return `[B, T, H, V]`."""
    return x_BHNCV.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)


class Decays(NamedTuple):
    """Cumulative decays within chunks, all at most 1.

    Attributes:
        between_BHNCCJ: From token j to token i; 0 where i does not see j.
        from_start_BHNCJ: From the chunk's initial state to token i; 0 where i is in another document.
        to_end_BHNCJ: From token j to the chunk's final state; 0 where j is in another document.
        across_BHNJ: From the chunk's initial to its final state; 0 where their documents differ.
    """

    between_BHNCCJ: Tensor
    from_start_BHNCJ: Tensor
    to_end_BHNCJ: Tensor
    across_BHNJ: Tensor


def cumulative_decays(g_BHNCJ: Tensor, chunks: Chunks) -> Decays:
    """Compute the cumulative decays within chunks.

    Args:
        g_BHNCJ: Logarithm of the decay of every token `[B, H, N, C, J]`, at most 0.
        chunks: Chunks of the row.
    """
    sums = g_BHNCJ.cumsum(3)
    is_in_first, is_in_last = chunks.is_in_first_NC[..., None], chunks.is_in_last_NC[..., None]
    # invisible pairs are masked before exp, where they could overflow
    between = (sums.unsqueeze(4) - sums.unsqueeze(3)).masked_fill(
        ~chunks.is_visible_NCC[..., None], -torch.inf
    )
    return Decays(
        between.exp(),
        sums.exp() * is_in_first,
        (sums[:, :, :, -1:] - sums).exp() * is_in_last,
        sums[:, :, :, -1].exp() * is_in_first[:, -1],
    )


def decayed_scores(a_BHNCK: Tensor, b_BHNCK: Tensor, decays: Decays) -> Tensor:
    """Compute a_i.(decay_ij * b_j) within chunks, `[B, H, N, C, C]`; 0 where i does not see j."""
    between = decays.between_BHNCCJ
    if between.shape[-1] == 1:
        return (a_BHNCK @ b_BHNCK.mT) * between.squeeze(-1)
    return torch.einsum("...ik,...ijk->...ij", a_BHNCK, between * b_BHNCK.unsqueeze(3))


def l2_normalize(x: Tensor) -> Tensor:
    """Normalize the last dimension as fla does, x / sqrt(sum x^2 + 1e-6), in at least fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
