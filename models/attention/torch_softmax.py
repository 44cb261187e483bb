"""Softmax attention by torch's own kernels: the yardstick of ours (attention.impl "torch")."""

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

# fastest first: on Hopper cuDNN takes 0.58 of the time of FlashAttention-2
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _document_ids(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    positions = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, positions, right=True)


def _masked_attention(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGK: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    window_size: int | None,
) -> torch.Tensor:
    """Compute attention over packed documents with an explicit mask, in blocks of max_seqlen queries.

    No document is longer than a block, so that a block's queries see only its own keys and those of the
    previous block: the mask has T * 2 * max_seqlen entries instead of T * T.
    """
    num_tokens = q_THK.shape[0]
    block = min(max_seqlen, num_tokens)
    num_blocks = -(-num_tokens // block)
    tail = num_blocks * block - num_tokens
    starts = torch.arange(num_blocks, device=q_THK.device).unsqueeze(1) * block
    o_query = starts + torch.arange(block, device=q_THK.device)
    o_key = starts + torch.arange(-block, block, device=q_THK.device)
    ids = F.pad(_document_ids(cu_seqlens, num_tokens), (block, tail), value=-1)
    is_same_document = ids[o_query + block].unsqueeze(2) == ids[o_key + block].unsqueeze(1)
    distance = o_query.unsqueeze(2) - o_key.unsqueeze(1)
    is_visible = is_same_document & (distance >= 0)
    if window_size is not None:
        is_visible &= distance < window_size
    q = F.pad(q_THK, (0, 0, 0, 0, 0, tail)).unflatten(0, (num_blocks, block)).transpose(1, 2)
    k, v = (
        F.pad(x, (0, 0, 0, 0, block, tail)).unfold(0, 2 * block, block).permute(0, 1, 3, 2)
        for x in (k_TGK, v_TGK)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_visible.unsqueeze(1), enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[:num_tokens]


def torch_softmax_attention(
    q_BTHK: torch.Tensor,
    k_BTGK: torch.Tensor,
    v_BTGK: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    window_size: int | None,
) -> torch.Tensor:
    """Compute causal softmax attention, sum_j softmax_j(q_i.k_j / sqrt(K)) v_j.

    Args:
        q_BTHK: Queries `[B, T, H, K]`.
        k_BTGK: Keys `[B, T, G, K]`.
        v_BTGK: Values `[B, T, G, K]`.
        cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1; None for B rows of one document each.
        max_seqlen: An upper bound on the length of a document.
        window_size: Number of keys that a query sees, its own included; None for no window.

    Returns:
        Output `[B, T, H, K]`, q's dtype.
    """
    if cu_seqlens is None and window_size is None:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        with sdpa_kernel(_BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)
    batch, num_tokens = q_BTHK.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=q_BTHK.device, dtype=torch.int32) * num_tokens
        max_seqlen = num_tokens
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        left = -1 if window_size is None else window_size - 1
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(left, 0))
        assert isinstance(out, torch.Tensor)
    else:
        out = _masked_attention(q, k, v, cu_seqlens, max_seqlen, window_size)
    return out.unflatten(0, (batch, num_tokens))
