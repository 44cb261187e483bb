"""Memory-bounded Parallax and softmax attention in PyTorch, for machines that the kernels do not serve.

It computes (1) to (5) and the gradients (7) to (11) of `parallax.reference`, in a loop over tiles of
`block_size` queries. A tile reads only the keys that its queries can see (causal bound above, window and
document bounds below), so the largest buffers are `[B, H, block_size, S]`; the backward recomputes them.

A tile holds whole rows of the score matrices, so tbar is available in fp32 before any weight is rounded: the
forward rounds w of (5) itself, which is (12) with c = tbar, and needs three products. The backward computes b
and T of (7) in fp32 from the tile, so that the row sums of G and U are zero up to rounding, and corrects the
rounding of G and U by (13). Saved for the backward: q, r, k, v, and per row lse and tbar (fp32). Without
probes (r = None) w is p, and the backward needs no U: (9').

Letters beside those of the reference: Z = B G, the batch of all matrix products; M = T H / G, a tile's
queries times the query heads that share its keys (queries outermost), so that GQA needs no repeated keys and
sums dK and dV in fp32.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from parallax.validation import check_bounds


class _Tile(NamedTuple):
    """One tile of queries, the keys that it can see, and the masks at both edges."""

    queries: slice
    keys: slice
    hidden_right: Tensor  # [t, 1, t]: keys after the query, among the last t of the tile's keys
    hidden_left: Tensor | None  # [t, 1, c]: keys before the query's first, among the first c


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics for inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_block_size(batch_size: int, device: torch.device) -> int:
    """Return the default number of queries in a tile, for each batch row.

    On CPU it is 64, so that a tile stays in cache: of 32 to 1024 the fastest or nearly so at batch 1 and 8.
    Elsewhere it is 1024 over the whole batch: on an H100 smaller tiles are launch-bound, larger ones take
    more memory and mask more.

    Args:
        batch_size: B.
        device: Device of the inputs.

    Returns:
        Queries in a tile, for each batch row.
    """
    return 64 if device.type == "cpu" else max(1, 1024 // max(1, batch_size))


@torch.no_grad()
def forward(
    q_BTHK: Tensor,
    r_BTHK: Tensor | None,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window_size: int | None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute Parallax or softmax attention tile by tile; copies `cu_seqlens` to the host once.

    Args:
        q_BTHK: Queries `[B, T, H, K]`, bf16/fp16/fp32/fp64, any strides.
        r_BTHK: Probes `[B, T, H, K]`, or None for softmax attention.
        k_BSGK: Keys `[B, S, G, K]`, S == T.
        v_BSGK: Values `[B, S, G, K]`.
        cu_seqlens: Document bounds `[N + 1]` int32 from 0 to T with batch 1, or None.
        scale: Factor of q.k.
        window_size: Number of newest keys that a query sees, its own included; None for all.
        block_size: Queries in a tile, for each batch row; None for `default_block_size`.

    Returns:
        `o [B, T, H, K]` in the dtype of q, `lse [B, T, H]` and `tbar [B, T, H]` (without r `[0]`) in fp32
        (fp64 for fp64), contiguous.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0 to T.
    """
    num_kv_heads = k_BSGK.shape[2]
    dtype = accumulation_dtype(q_BTHK.dtype)
    q_ZTRK = _fold(q_BTHK, num_kv_heads)
    r_ZTRK = None if r_BTHK is None else _fold(r_BTHK, num_kv_heads)
    k_ZSK, v_ZSK = (_fold(x, num_kv_heads).squeeze(2) for x in (k_BSGK, v_BSGK))
    o_BTHK = torch.empty(q_BTHK.shape, dtype=q_BTHK.dtype, device=q_BTHK.device)
    lse_BTH = torch.empty(q_BTHK.shape[:3], dtype=dtype, device=q_BTHK.device)
    tbar_BTH = lse_BTH.new_empty((0,) if r_BTHK is None else lse_BTH.shape)

    for tile in _tiles(q_BTHK, cu_seqlens, window_size, block_size):
        k_tile_ZSK, v_tile_ZSK = k_ZSK[:, tile.keys], v_ZSK[:, tile.keys]
        q_ZMK = _rows_of(q_ZTRK, tile)
        s_ZMS = _hide(_matmul(q_ZMK, k_tile_ZSK.mT, dtype).mul_(scale), tile, float("-inf"))
        m_ZM1 = s_ZMS.amax(-1, keepdim=True)
        w_ZMS = s_ZMS.sub_(m_ZM1).exp_()
        d_ZM1 = w_ZMS.sum(-1, keepdim=True)
        if r_ZTRK is not None:
            t_ZMS = _hide(_matmul(_rows_of(r_ZTRK, tile), k_tile_ZSK.mT, dtype), tile, 0.0)
            tbar_ZM1 = (w_ZMS * t_ZMS).sum(-1, keepdim=True) / d_ZM1
            # tbar - t first: a row with one visible key then has the weight 1 exactly
            w_ZMS = torch.sub(tbar_ZM1, t_ZMS, out=t_ZMS).add_(1).mul_(w_ZMS)
            _write(tbar_BTH, tbar_ZM1, tile.queries, num_kv_heads)
        o_ZMK = _matmul(w_ZMS.to(q_BTHK.dtype), v_tile_ZSK, dtype).div_(d_ZM1)
        _write(o_BTHK, o_ZMK, tile.queries, num_kv_heads)
        _write(lse_BTH, d_ZM1.log_().add_(m_ZM1), tile.queries, num_kv_heads)
    return o_BTHK, lse_BTH, tbar_BTH


@torch.no_grad()
def backward(
    do_BTHK: Tensor,
    q_BTHK: Tensor,
    r_BTHK: Tensor | None,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    lse_BTH: Tensor,
    tbar_BTH: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window_size: int | None,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients (10) and (11) tile by tile; copies `cu_seqlens` to the host once.

    Args:
        do_BTHK: Gradient of the output `[B, T, H, K]`, any strides.
        q_BTHK: Queries `[B, T, H, K]`, as given to `forward`; likewise all that follows.
        r_BTHK: Probes `[B, T, H, K]`, or None for softmax attention.
        k_BSGK: Keys `[B, S, G, K]`.
        v_BSGK: Values `[B, S, G, K]`.
        lse_BTH: Log-sum-exp `[B, T, H]` from `forward`.
        tbar_BTH: Mean probe scores `[B, T, H]` from `forward`; not read without r.
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        scale: Factor of q.k.
        window_size: Keys that a query sees, or None.
        block_size: Queries in a tile, for each batch row; need not be that of the forward.

    Returns:
        `dq [B, T, H, K]`, `dr [B, T, H, K]` (without r `[0]`), `dk [B, S, G, K]`, `dv [B, S, G, K]` in the
        dtype of q, contiguous.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0 to T.
    """
    num_kv_heads = k_BSGK.shape[2]
    dtype = accumulation_dtype(q_BTHK.dtype)
    q_ZTRK, do_ZTRK, lse_ZTR1 = (
        _fold(x, num_kv_heads) for x in (q_BTHK, do_BTHK.to(q_BTHK.dtype), lse_BTH[..., None])
    )
    probes = None
    if r_BTHK is not None:
        probes = _fold(r_BTHK, num_kv_heads), _fold(tbar_BTH[..., None], num_kv_heads)
    k_ZSK, v_ZSK = (_fold(x, num_kv_heads).squeeze(2) for x in (k_BSGK, v_BSGK))
    dq_BTHK, dr_BTHK = (
        torch.empty((0,) if x is None else x.shape, dtype=q_BTHK.dtype, device=q_BTHK.device)
        for x in (q_BTHK, r_BTHK)
    )
    dk_ZSK, dv_ZSK = (torch.zeros(k_ZSK.shape, dtype=dtype, device=k_ZSK.device) for _ in range(2))

    for tile in _tiles(q_BTHK, cu_seqlens, window_size, block_size):
        q_ZMK, do_ZMK, lse_ZM1 = (_rows_of(x, tile) for x in (q_ZTRK, do_ZTRK, lse_ZTR1))
        k_tile_ZSK, v_tile_ZSK = k_ZSK[:, tile.keys], v_ZSK[:, tile.keys]
        s_ZMS = _matmul(q_ZMK, k_tile_ZSK.mT, dtype)
        p_ZMS = _hide(torch.add(-lse_ZM1, s_ZMS, alpha=scale, out=s_ZMS), tile, float("-inf")).exp_()
        of_probes = None
        if probes is None:
            g_ZMS, w_ZMS = _softmax_score_gradients(p_ZMS, do_ZMK, v_tile_ZSK, dtype)
        else:
            r_ZMK, tbar_ZM1 = (_rows_of(x, tile) for x in probes)
            t_ZMS = _hide(_matmul(r_ZMK, k_tile_ZSK.mT, dtype), tile, 0.0)
            w_ZMS = torch.sub(tbar_ZM1, t_ZMS, out=t_ZMS).add_(1).mul_(p_ZMS)
            g_ZMS, u_ZMS, w_ZMS = _score_gradients(p_ZMS, w_ZMS, do_ZMK, v_tile_ZSK, dtype)
            of_probes = u_ZMS, r_ZMK
        k_ref_Z1K = k_tile_ZSK.mean(1, keepdim=True, dtype=dtype)
        dq_ZMK = _centred_product(g_ZMS, k_tile_ZSK, k_ref_Z1K)
        _write(dq_BTHK, dq_ZMK.mul_(scale), tile.queries, num_kv_heads)
        dk_ZSK[:, tile.keys].add_(_matmul(g_ZMS.mT, q_ZMK, dtype), alpha=scale)
        if of_probes is not None:
            u_ZMS, r_ZMK = of_probes
            dr_ZMK = _centred_product(u_ZMS, k_tile_ZSK, k_ref_Z1K)
            _write(dr_BTHK, dr_ZMK, tile.queries, num_kv_heads)
            dk_ZSK[:, tile.keys].add_(_matmul(u_ZMS.mT, r_ZMK, dtype))
        dv_ZSK[:, tile.keys].add_(_matmul(w_ZMS.mT, do_ZMK, dtype))
    return dq_BTHK, dr_BTHK, _unfold_keys(dk_ZSK, k_BSGK), _unfold_keys(dv_ZSK, v_BSGK)


def _score_gradients(
    p_ZMS: Tensor, w_ZMS: Tensor, do_ZMK: Tensor, v_ZSK: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return G (9), U (8) and w (5) of a tile, rounded to the inputs' dtype; overwrites p and w."""
    a_ZMS = _matmul(do_ZMK, v_ZSK.mT, dtype)
    b_ZM1 = (p_ZMS * a_ZMS).sum(-1, keepdim=True)
    total_ZM1 = (w_ZMS * a_ZMS).sum(-1, keepdim=True)
    w_rounded_ZMS = w_ZMS.to(do_ZMK.dtype, copy=True)
    a_ZMS.sub_(b_ZM1)
    g_ZMS = w_ZMS.mul_(a_ZMS).addcmul_(p_ZMS, b_ZM1 - total_ZM1)
    u_ZMS = p_ZMS.mul_(a_ZMS).neg_()
    return g_ZMS.to(do_ZMK.dtype), u_ZMS.to(do_ZMK.dtype), w_rounded_ZMS


def _softmax_score_gradients(
    p_ZMS: Tensor, do_ZMK: Tensor, v_ZSK: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return G (9') and p of a tile, rounded to the inputs' dtype; overwrites p."""
    a_ZMS = _matmul(do_ZMK, v_ZSK.mT, dtype)
    total_ZM1 = (p_ZMS * a_ZMS).sum(-1, keepdim=True)
    p_rounded_ZMS = p_ZMS.to(do_ZMK.dtype, copy=True)
    return a_ZMS.sub_(total_ZM1).mul_(p_ZMS).to(do_ZMK.dtype), p_rounded_ZMS


def _centred_product(g_ZMS: Tensor, k_ZSK: Tensor, k_ref_Z1K: Tensor) -> Tensor:
    """Multiply a rounded tile, whose exact row sums are zero, by the keys, corrected by (13)."""
    row_sum_ZM1 = g_ZMS.sum(-1, keepdim=True, dtype=k_ref_Z1K.dtype)
    return _matmul(g_ZMS, k_ZSK, k_ref_Z1K.dtype).addcmul_(row_sum_ZM1, k_ref_Z1K, value=-1)


def _hide(x_ZMS: Tensor, tile: _Tile, value: float) -> Tensor:
    """Fill the masked entries of a tile with a value, in place."""
    x_ZTRS = x_ZMS.unflatten(1, (tile.hidden_right.shape[0], -1))
    x_ZTRS[..., -tile.hidden_right.shape[-1] :].masked_fill_(tile.hidden_right, value)
    if tile.hidden_left is not None:
        x_ZTRS[..., : tile.hidden_left.shape[-1]].masked_fill_(tile.hidden_left, value)
    return x_ZMS


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply batches of matrices; accumulate and return in `dtype`."""
    if a.dtype == dtype:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=dtype)
    # products of 16-bit numbers are exact in fp32: the same result as above
    return torch.bmm(a.to(dtype), b.to(dtype))


def _tiles(
    q_BTHK: Tensor, cu_seqlens: Tensor | None, window_size: int | None, block_size: int | None
) -> Iterator[_Tile]:
    """Yield the tiles of queries with the keys that they can see."""
    batch_size, num_tokens = q_BTHK.shape[:2]
    block_size = default_block_size(batch_size, q_BTHK.device) if block_size is None else block_size
    bounds = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    check_bounds(bounds, num_tokens)

    def first_key(query: int) -> int:
        document = bounds[bisect_right(bounds, query) - 1]
        return document if window_size is None else max(document, query - window_size + 1)

    position_T = torch.arange(num_tokens, device=q_BTHK.device)
    first_T = torch.zeros_like(position_T)
    if cu_seqlens is not None:
        first_T = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), position_T, right=True) - 1]
    if window_size is not None:
        first_T = torch.maximum(first_T, position_T - (window_size - 1))

    for start in range(0, num_tokens, block_size):
        stop = min(start + block_size, num_tokens)
        first, last_first = first_key(start), first_key(stop - 1)
        rows_T11 = position_T[start:stop, None, None]
        hidden_left = None
        if last_first > first:
            hidden_left = position_T[first:last_first] < first_T[start:stop, None, None]
        yield _Tile(slice(start, stop), slice(first, stop), position_T[start:stop] > rows_T11, hidden_left)


def _rows_of(x_ZTRK: Tensor, tile: _Tile) -> Tensor:
    """Return a tile's rows `[Z, M, K]` of a folded tensor."""
    return x_ZTRK[:, tile.queries].flatten(1, 2)


def _fold(x_BTHK: Tensor, num_kv_heads: int) -> Tensor:
    """Fold `[B, T, H, K]` to contiguous `[Z, T, H / G, K]`."""
    x_BTGRK = x_BTHK.unflatten(2, (num_kv_heads, -1))
    return x_BTGRK.permute(0, 2, 1, 3, 4).contiguous().flatten(0, 1)


def _write(out_BTHx: Tensor, x_ZMx: Tensor, queries: slice, num_kv_heads: int) -> None:
    """Write a tile's rows into `[B, T, H, K]` or, one column wide, `[B, T, H]`."""
    out_BGTRx = out_BTHx[:, queries].unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
    out_BGTRx.copy_(x_ZMx.view(out_BGTRx.shape))


def _unfold_keys(x_ZSK: Tensor, like_BSGK: Tensor) -> Tensor:
    """Unfold `[Z, S, K]` to contiguous `[B, S, G, K]` in the dtype of `like`."""
    out_BSGK = torch.empty(like_BSGK.shape, dtype=like_BSGK.dtype, device=like_BSGK.device)
    out_BSGK.transpose(1, 2).copy_(x_ZSK.unflatten(0, (like_BSGK.shape[0], like_BSGK.shape[2])))
    return out_BSGK
