"""Backward kernels of Parallax and softmax attention, (7) to (11) and (13) of `parallax.reference`.

First pass, one program per tile of queries: b = dO.vbar and T = dO.o of its rows, then dQ and dR with five
products per tile. At the end the row sums of the rounded G and U times a reference key are subtracted from dQ
and dR, (13). The pass also stores the row constants of the second one: lse in base 2, scale (1 + tbar),
b / scale and b - T.

Second pass, one program per tile of keys: dK and dV with six products per tile, summed over the query heads
of the group in fp32 registers. Scores are transposed, so that P^T and the two gradient tiles stay in
registers as left operands of the next products.

Without probes (PROBES false: softmax attention, (9')) there are no U and dR, the passes take three and four
products per tile, and the row constants are lse in base 2 and T.

Two passes take eleven products (seven without probes); a single one would take eight (five), but reduce in
memory by atomic additions. Without these the result does not depend on the order of the programs and is
bit-identical from run to run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from parallax.kernels.addressing import (
    DQDR_CACHE_BYTES,
    LOG2E,
    Mask,
    can_use_descriptors,
    describe,
    end_query,
    first_key,
    heads_per_section,
    in_registers,
    key_bounds,
    load_tile,
    program_of,
    store_tile,
    strides_of,
    with_contiguous_rows,
)
from parallax.kernels.row_sums import add_row_sums, round_tile, total_row_sums
from parallax.kernels.tiles import KernelName, Tile, num_columns, tile_of


@triton.jit
def _dqdr_tile(
    b_q, b_r, b_do, k, v, k_strides, v_strides, i_b, i_g, i_s, o_t, b_first, b_rows, state, T, scale_log2,
    BS: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
    BOUNDED: tl.constexpr, RANK_ONE: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dQ / scale and -dR, and to the row sums of the rounded G and -U."""
    if PROBES:
        b_lse, b_t1, b_b, b_e = b_rows
        b_dq, b_dr, b_g_sum, b_u_sum = state
    else:
        b_lse, b_b = b_rows
        b_dq, b_g_sum = state
    # [BS, BK]
    b_k = load_tile(k, k_strides, i_b, i_g, i_s, T, BS, BK, K, TMA)
    b_v = load_tile(v, v_strides, i_b, i_g, i_s, T, BS, BK, K, TMA)
    # [BT, BS]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
    if PROBES:
        b_t = tl.dot(b_r, tl.trans(b_k), input_precision="tf32x3")
    b_a = tl.dot(b_do, tl.trans(b_v), input_precision="tf32x3")
    b_p = tl.math.exp2(b_s * scale_log2 - b_lse[:, None])
    if MASKED:
        o_s = i_s + tl.arange(0, BS)
        m_s = o_s[None, :] <= o_t[:, None]
        if BOUNDED:
            m_s = m_s & (o_s[None, :] >= b_first[:, None])
        b_p = tl.where(m_s, b_p, 0.0)
        if PROBES:
            b_t = tl.where(m_s, b_t, 0.0)
    # without probes b is T, and G is -U
    b_a = b_a - b_b[:, None]
    b_u = b_p * b_a
    b_g = (b_t1[:, None] - b_t) * b_u + b_p * b_e[:, None] if PROBES else b_u
    b_g = round_tile(b_g, b_k.dtype, b_g_sum.shape[1])
    if PROBES:
        b_u = round_tile(b_u, b_k.dtype, b_u_sum.shape[1])
    # [BT, BK]
    b_dq = tl.dot(b_g, b_k, b_dq, input_precision="tf32x3")
    if PROBES:
        b_dr = tl.dot(b_u, b_k, b_dr, input_precision="tf32x3")
    if RANK_ONE:
        b_g_sum = add_row_sums(b_g, b_g_sum)
        if PROBES:
            b_u_sum = add_row_sums(b_u, b_u_sum)
    return (b_dq, b_dr, b_g_sum, b_u_sum) if PROBES else (b_dq, b_g_sum)


@triton.jit(do_not_specialize=["T", "T_padded", "window_size", "num_heads", "section"])
def _parallax_bwd_dqdr_kernel(
    q, r, k, v, do, o, vbar, lse, tbar, rows, dq, dr, first,
    q_strides, r_strides, k_strides, v_strides, do_strides, o_strides,
    T, T_padded, window_size, num_heads, section, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    TMA: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, RANK_ONE: tl.constexpr,
    IN_REGISTERS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Compute BT rows of dQ, dR and the row constants of one head per program."""
    BOUNDED: tl.constexpr = PACKED or WINDOW
    PROBES: tl.constexpr = r is not None
    scale_log2 = scale * LOG2E
    num_tiles = tl.cdiv(T, BT)
    i_rank, i_bh = program_of(tl.program_id(0), num_tiles, num_heads, section)
    i_t = (num_tiles - 1 - i_rank) * BT
    i_b = i_bh // H
    i_h = i_bh % H
    i_g = i_h // (H // G)

    o_t = i_t + tl.arange(0, BT)
    m_t = o_t < T
    p_t = tl.cast(i_bh, tl.int64) * T + o_t
    # pointer loads first: they run while the program waits for the tiles of the descriptors
    b_lse = tl.load(lse + p_t, mask=m_t, other=0.0) * LOG2E
    if PROBES:
        b_t1 = tl.load(tbar + p_t, mask=m_t, other=0.0) + 1.0
    b_o = load_tile(o, o_strides, i_b, i_h, i_t, T, BT, BK, K, False)
    if PROBES:
        b_vbar = load_tile(vbar, o_strides, i_b, i_h, i_t, T, BT, BK, K, False)
    b_do = load_tile(do, do_strides, i_b, i_h, i_t, T, BT, BK, K, TMA)
    b_q = load_tile(q, q_strides, i_b, i_h, i_t, T, BT, BK, K, TMA)
    b_r = None
    if PROBES:
        b_r = load_tile(r, r_strides, i_b, i_h, i_t, T, BT, BK, K, TMA)
        b_b = tl.sum(b_do.to(tl.float32) * b_vbar.to(tl.float32), 1)
        b_e = b_b - tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
        p_rows = tl.cast(i_bh, tl.int64) * 4 * T_padded + o_t
        tl.store(rows + p_rows, b_lse)
        tl.store(rows + p_rows + T_padded, b_t1 * scale)
        tl.store(rows + p_rows + 2 * T_padded, b_b / scale)
        tl.store(rows + p_rows + 3 * T_padded, b_e)
        b_rows = (b_lse, b_t1, b_b, b_e)
    else:
        b_total = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
        p_rows = tl.cast(i_bh, tl.int64) * 2 * T_padded + o_t
        tl.store(rows + p_rows, b_lse)
        tl.store(rows + p_rows + T_padded, b_total)
        b_rows = (b_lse, b_total)

    if IN_REGISTERS >= 1:
        b_q = in_registers(b_q, BK)
    if IN_REGISTERS == 2:
        b_do = in_registers(b_do, BK)
    b_first = o_t
    if BOUNDED:
        b_first = first_key(first, o_t, T, window_size, PACKED, WINDOW)
    i_first, i_unmasked, i_diagonal = key_bounds(first, i_t, T, window_size, BT, BS, PACKED, WINDOW)

    b_zero = tl.zeros([BT, BK], tl.float32)
    b_sum = tl.zeros([BT, SUMS], tl.float32)
    state = (b_zero, b_zero, b_sum, b_sum) if PROBES else (b_zero, b_sum)
    num_diagonal = tl.cdiv(tl.minimum(i_t + BT, T) - i_diagonal, BS)
    # disable_licm: otherwise hoisted addresses of loop-invariant operands cause register spills
    for i_x in tl.range(0, num_diagonal + (i_unmasked - i_first) // BS, disable_licm=True):
        i_s = tl.where(i_x < num_diagonal, i_diagonal + i_x * BS, i_first + (i_x - num_diagonal) * BS)
        state = _dqdr_tile(
            b_q, b_r, b_do, k, v, k_strides, v_strides, i_b, i_g, i_s, o_t, b_first, b_rows, state, T,
            scale_log2, BS, BK, K, TMA, True, BOUNDED, RANK_ONE, PROBES,
        )  # fmt: skip
    for i_s in tl.range(i_unmasked, i_diagonal, BS, disable_licm=True):
        state = _dqdr_tile(
            b_q, b_r, b_do, k, v, k_strides, v_strides, i_b, i_g, i_s, o_t, b_first, b_rows, state, T,
            scale_log2, BS, BK, K, TMA, False, BOUNDED, RANK_ONE, PROBES,
        )  # fmt: skip

    if PROBES:
        b_dq, b_dr, b_g_sum, b_u_sum = state
    else:
        b_dq, b_g_sum = state
    if RANK_ONE:
        # (13) holds for any vector; the mean key of the diagonal tile is close to the common part of the keys
        b_k = load_tile(k, k_strides, i_b, i_g, i_diagonal, T, BS, BK, K, TMA)
        b_k_ref = tl.sum(b_k.to(tl.float32), 0) / tl.minimum(T - i_diagonal, BS)
        b_dq = b_dq - total_row_sums(b_g_sum)[:, None] * b_k_ref[None, :]
        if PROBES:
            b_dr = b_dr - total_row_sums(b_u_sum)[:, None] * b_k_ref[None, :]
    # [BT, BK]
    store_tile(dq, b_dq * scale, i_b, i_h, i_t, T, H, K, TMA)
    if PROBES:
        store_tile(dr, -b_dr, i_b, i_h, i_t, T, H, K, TMA)


@triton.jit
def _load_row_constant(
    rows, i_bh, i_x: tl.constexpr, i_t, T_padded, BT: tl.constexpr, TMA: tl.constexpr, COUNT: tl.constexpr = 4
):
    """Load row constant i_x of BT rows, [BT]; zeros past the end."""
    if TMA:
        b_x = rows.load([i_bh, i_x, i_t]).reshape(BT)
    else:
        o_t = i_t + tl.arange(0, BT)
        p_x = rows + (tl.cast(i_bh, tl.int64) * COUNT + i_x) * T_padded + o_t
        b_x = tl.load(p_x, mask=o_t < T_padded, other=0.0)
    return b_x


@triton.jit
def _dkdv_tile(
    b_k, b_v, q, r, do, rows, q_strides, r_strides, do_strides, i_b, i_h, i_t, o_s, b_end, state,
    T, T_padded, scale, scale_log2, H: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, K: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add one tile of one head's queries to dK / scale and scale * dV (without probes dV)."""
    PROBES: tl.constexpr = r is not None
    b_dk, b_dv = state
    # [BT, BK]
    b_q = load_tile(q, q_strides, i_b, i_h, i_t, T, BT, BK, K, TMA)
    if PROBES:
        b_r = load_tile(r, r_strides, i_b, i_h, i_t, T, BT, BK, K, TMA)
    b_do = load_tile(do, do_strides, i_b, i_h, i_t, T, BT, BK, K, TMA)
    i_bh = i_b * H + i_h
    if PROBES:
        b_lse = _load_row_constant(rows, i_bh, 0, i_t, T_padded, BT, TMA)
        b_t1 = _load_row_constant(rows, i_bh, 1, i_t, T_padded, BT, TMA)
        b_b = _load_row_constant(rows, i_bh, 2, i_t, T_padded, BT, TMA)
        b_e = _load_row_constant(rows, i_bh, 3, i_t, T_padded, BT, TMA)
    else:
        b_lse = _load_row_constant(rows, i_bh, 0, i_t, T_padded, BT, TMA, 2)
        b_total = _load_row_constant(rows, i_bh, 1, i_t, T_padded, BT, TMA, 2)
    # [BS, BT]
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="tf32x3")
    if PROBES:
        b_t = tl.dot(b_k, tl.trans(b_r), input_precision="tf32x3")
    b_a = tl.dot(b_v, tl.trans(b_do), input_precision="tf32x3")
    b_p = tl.math.exp2(b_s * scale_log2 - b_lse[None, :])
    if PROBES:
        # scale * (1 + tbar - t) and (b - a) / scale
        b_t = b_t1[None, :] - b_t * scale
        b_a = b_b[None, :] - b_a * (1.0 / scale)
    if MASKED:
        o_t = i_t + tl.arange(0, BT)
        m_s = o_s[:, None] <= o_t[None, :]
        if BOUNDED:
            m_s = m_s & (o_t[None, :] < b_end[:, None])
        b_p = tl.where(m_s, b_p, 0.0)
        if PROBES:
            b_t = tl.where(m_s, b_t, 0.0)
    if PROBES:
        b_w = b_p * b_t
        b_u = b_p * b_a
        b_g = b_p * b_e[None, :] - b_w * b_a
    else:
        b_w = b_p
        b_g = b_p * (b_a - b_total[None, :])
    # [BS, BK]
    b_dv = tl.dot(b_w.to(b_do.dtype), b_do, b_dv, input_precision="tf32x3")
    b_dk = tl.dot(b_g.to(b_q.dtype), b_q, b_dk, input_precision="tf32x3")
    if PROBES:
        b_dk = tl.dot(b_u.to(b_q.dtype), b_r, b_dk, input_precision="tf32x3")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "T_padded", "window_size", "num_heads", "section"])
def _parallax_bwd_dkdv_kernel(
    q, r, k, v, do, rows, dk, dv, end, q_strides, r_strides, k_strides, v_strides, do_strides,
    T, T_padded, window_size, num_heads, section, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    TMA: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Compute BS rows of dK and dV of one kv head per program."""
    BOUNDED: tl.constexpr = PACKED or WINDOW
    scale_log2 = scale * LOG2E
    GROUP: tl.constexpr = H // G
    i_rank, i_bg = program_of(tl.program_id(0), tl.cdiv(T, BS), num_heads, section)
    i_s = i_rank * BS
    i_b = i_bg // G
    i_g = i_bg % G

    b_k = load_tile(k, k_strides, i_b, i_g, i_s, T, BS, BK, K, TMA)
    b_v = load_tile(v, v_strides, i_b, i_g, i_s, T, BS, BK, K, TMA)
    if IN_REGISTERS >= 1:
        b_k = in_registers(b_k, BK)
    if IN_REGISTERS == 2:
        b_v = in_registers(b_v, BK)
    o_s = i_s + tl.arange(0, BS)
    b_end = o_s
    i_end = T
    i_unmasked = T
    if BOUNDED:
        b_end = end_query(end, o_s, T, window_size, PACKED, WINDOW)
        i_end = end_query(end, tl.minimum(i_s + BS, T) - 1, T, window_size, PACKED, WINDOW)
        i_unmasked = end_query(end, i_s, T, window_size, PACKED, WINDOW) // BT * BT
    i_start = i_s // BT * BT
    i_diagonal = tl.minimum(tl.cdiv(i_s + BS - 1, BT) * BT, tl.cdiv(i_end, BT) * BT)
    i_unmasked = tl.maximum(i_unmasked, i_diagonal)

    # the masked and the unmasked tiles each have one loop over all heads of the group, which keeps the load
    # pipeline full; disable_licm as in the first pass
    state = (tl.zeros([BS, BK], tl.float32), tl.zeros([BS, BK], tl.float32))
    num_diagonal = tl.cdiv(i_diagonal - i_start, BT)
    num_masked = num_diagonal
    if BOUNDED:
        num_masked += tl.cdiv(tl.maximum(i_end - i_unmasked, 0), BT)
    for i_x in tl.range(0, num_masked * GROUP, disable_licm=True):
        i_h = i_g * GROUP + i_x // num_masked
        i_y = i_x % num_masked
        i_t = tl.where(i_y < num_diagonal, i_start + i_y * BT, i_unmasked + (i_y - num_diagonal) * BT)
        state = _dkdv_tile(
            b_k, b_v, q, r, do, rows, q_strides, r_strides, do_strides, i_b, i_h, i_t, o_s, b_end, state,
            T, T_padded, scale, scale_log2, H, BT, BK, K, TMA, True, BOUNDED,
        )  # fmt: skip
    num_unmasked = tl.cdiv(i_unmasked - i_diagonal, BT)
    i_h = i_g * GROUP
    i_t = i_diagonal
    for _ in tl.range(0, num_unmasked * GROUP, disable_licm=True):
        state = _dkdv_tile(
            b_k, b_v, q, r, do, rows, q_strides, r_strides, do_strides, i_b, i_h, i_t, o_s, b_end, state,
            T, T_padded, scale, scale_log2, H, BT, BK, K, TMA, False, BOUNDED,
        )  # fmt: skip
        i_t += BT
        is_last = i_t >= i_unmasked
        i_h = tl.where(is_last, i_h + 1, i_h)
        i_t = tl.where(is_last, i_diagonal, i_t)

    b_dk, b_dv = state
    # [BS, BK]
    store_tile(dk, b_dk * scale, i_b, i_g, i_s, T, G, K, TMA)
    if r is not None:
        b_dv = b_dv / scale
    store_tile(dv, b_dv, i_b, i_g, i_s, T, G, K, TMA)


def backward(
    do: Tensor,
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    vbar: Tensor,
    lse: Tensor,
    tbar: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients (10) and (11) by both passes; deterministic, without host synchronization.

    Args:
        do: Gradient of o `[B, T, H, K]`.
        q: Queries `[B, T, H, K]`, as given to `forward`, as all inputs not listed here.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        o: From `forward`, as are the next three.
        vbar: Softmax attention `[B, T, H, K]`; not read without r, like tbar.
        lse: `[B, H, T]` fp32.
        tbar: `[B, H, T]` fp32.
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        scale: Factor of q.k, positive.
        window_size: Keys that a query sees, or None.

    Returns:
        `dq`, `dr` `[B, T, H, K]` (without r `[0]`) and `dk`, `dv` `[B, T, G, K]` in the dtype of q,
        contiguous.
    """
    operands = Operands(
        with_contiguous_rows(q),
        None if r is None else with_contiguous_rows(r),
        *(with_contiguous_rows(x) for x in (k, v, do.to(q.dtype))),
    )
    mask = Mask.of(cu_seqlens, q.shape[1], window_size)
    if q.numel() == 0:
        dr = q.new_empty(0) if r is None else torch.empty_like(r)
        return torch.empty_like(q), dr, torch.zeros_like(k), torch.zeros_like(v)
    dq, dr, rows = query_gradients(operands, o, vbar, lse, tbar, mask, scale)
    dk, dv = key_gradients(operands, rows, mask, scale)
    return dq, dr, dk, dv


class Operands(NamedTuple):
    """Inputs that both passes load tile by tile, each with a contiguous last dimension.

    Attributes:
        q: Queries `[B, T, H, K]`.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        do: Gradient of the output `[B, T, H, K]`.
    """

    q: Tensor
    r: Tensor | None
    k: Tensor
    v: Tensor
    do: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All operands but a missing r."""
        return [x for x in self if x is not None]

    @property
    def num_row_constants(self) -> int:
        """Number of row constants that the first pass stores for the second."""
        return 2 if self.r is None else 4

    def described(self, tile: Tile) -> list[TensorDescriptor | None]:
        """Return the TMA descriptors that load this tile's rows, None for a missing r."""
        rows = (tile.block_t, tile.block_t, tile.block_s, tile.block_s, tile.block_t)
        block_k = num_columns(self.q.shape[3])
        pairs = zip(self, rows, strict=True)
        return [None if x is None else describe(x, n, block_k) for x, n in pairs]


def query_gradients(
    operands: Operands,
    o: Tensor,
    vbar: Tensor,
    lse: Tensor,
    tbar: Tensor,
    mask: Mask,
    scale: float,
    *,
    tile: Tile | None = None,
    use_descriptors: bool | None = None,
    is_corrected: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dQ, dR and the row constants by the first pass.

    Args:
        operands: Inputs and dO.
        o: From `forward`, as are the next three.
        vbar: Softmax attention `[B, T, H, K]`; not read without probes, like tbar.
        lse: `[B, H, T]` fp32.
        tbar: `[B, H, T]` fp32.
        mask: Which keys queries see.
        scale: Factor of q.k.
        tile: Tile to tune; None for that of `parallax.kernels.tiles`.
        use_descriptors: Whether TMA descriptors load the operands, for tuning; None for wherever they can.
        is_corrected: Whether to apply (13); False only to measure its cost and accuracy.

    Returns:
        dq, dr `[B, T, H, K]` (without probes `[0]`) and the row constants `[B * H, 4, T rounded up]` fp32
        for `key_gradients`, without probes `[B * H, 2, T rounded up]`.
    """
    batch_size, num_tokens, num_heads, head_dim = operands.q.shape
    num_kv_heads = operands.k.shape[2]
    if use_descriptors is None:
        use_descriptors = can_use_descriptors(*operands.tensors)
    name: KernelName = "softmax_dq" if operands.r is None else "dqdr"
    tile = tile or tile_of(name, operands.q, use_descriptors and is_corrected, mask.reach(num_tokens))
    if tile.is_specialized:
        from parallax.kernels import hopper_dqdr, hopper_softmax_dq

        assert is_corrected, "the warp-specialized kernel always applies (13)"
        if operands.r is None:
            return hopper_softmax_dq.query_gradients(
                operands.q, operands.k, operands.v, operands.do, o, lse, mask, scale, tile
            )
        return hopper_dqdr.query_gradients(*operands, o, vbar, lse, tbar, mask, scale, tile)
    use_descriptors = use_descriptors and tile.use_descriptors
    dq, dr = (
        torch.empty((0,) if x is None else o.shape, dtype=o.dtype, device=o.device)
        for x in (operands.q, operands.r)
    )
    num_tiles = triton.cdiv(num_tokens, tile.block_t)
    num_programs = batch_size * num_heads
    rows = torch.empty(
        num_programs,
        operands.num_row_constants,
        num_tiles * tile.block_t,
        dtype=torch.float32,
        device=o.device,
    )
    q, r, k, v, do = operands.described(tile) if use_descriptors else operands
    r_strides = None if operands.r is None else strides_of(operands.r)
    block_k = num_columns(head_dim)
    dq_out = describe(dq, tile.block_t, block_k) if use_descriptors else dq
    dr_out = describe(dr, tile.block_t, block_k) if use_descriptors and operands.r is not None else dr
    streamed = 2 * mask.reach(num_tokens) * head_dim * o.element_size()
    section = heads_per_section(num_programs, num_heads // num_kv_heads, streamed, DQDR_CACHE_BYTES)
    _parallax_bwd_dqdr_kernel[(num_tiles * num_programs,)](
        q, r, k, v, do, o, vbar, lse, tbar, rows, dq_out, dr_out, mask.first,
        strides_of(operands.q), r_strides, strides_of(operands.k), strides_of(operands.v),
        strides_of(operands.do), strides_of(o),
        num_tokens, rows.shape[2], mask.window_size or 0, num_programs, section, scale,
        H=num_heads, G=num_kv_heads, K=head_dim, BK=block_k,
        BT=tile.block_t, BS=tile.block_s, TMA=use_descriptors, PACKED=mask.is_packed, WINDOW=mask.has_window,
        RANK_ONE=is_corrected, IN_REGISTERS=tile.in_registers, SUMS=tile.sums,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dq, dr, rows


def key_gradients(
    operands: Operands,
    rows: Tensor,
    mask: Mask,
    scale: float,
    *,
    tile: Tile | None = None,
    use_descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dK and dV by the second pass.

    Args:
        operands: Inputs and dO.
        rows: Row constants from `query_gradients`.
        mask: Which keys queries see.
        scale: Factor of q.k.
        tile: Tile to tune; None for that of `parallax.kernels.tiles`.
        use_descriptors: Whether TMA descriptors load the operands, for tuning; None for wherever they can.

    Returns:
        dk, dv `[B, T, G, K]`.
    """
    batch_size, num_tokens, num_heads, head_dim = operands.q.shape
    num_kv_heads = operands.k.shape[2]
    if use_descriptors is None:
        use_descriptors = can_use_descriptors(*operands.tensors)
    name: KernelName = "softmax_dkdv" if operands.r is None else "dkdv"
    tile = tile or tile_of(name, operands.q, use_descriptors, mask.reach(num_tokens))
    if tile.is_specialized:
        from parallax.kernels import hopper_dkdv

        return hopper_dkdv.key_gradients(*operands, rows, mask, scale, tile=tile)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (operands.k, operands.v))
    num_programs = batch_size * num_kv_heads
    use_descriptors = use_descriptors and tile.use_descriptors
    q, r, k, v, do = operands.described(tile) if use_descriptors else operands
    r_strides = None if operands.r is None else strides_of(operands.r)
    constants = TensorDescriptor.from_tensor(rows, [1, 1, tile.block_t]) if use_descriptors else rows
    block_k = num_columns(head_dim)
    dk_out, dv_out = (describe(x, tile.block_s, block_k) if use_descriptors else x for x in (dk, dv))
    streamed = (
        (len(operands.tensors) - 2)
        * num_heads
        // num_kv_heads
        * mask.reach(num_tokens)
        * head_dim
        * dk.element_size()
    )
    section = heads_per_section(num_programs, 1, streamed)
    _parallax_bwd_dkdv_kernel[(triton.cdiv(num_tokens, tile.block_s) * num_programs,)](
        q, r, k, v, do, constants, dk_out, dv_out, mask.end,
        strides_of(operands.q), r_strides, strides_of(operands.k), strides_of(operands.v),
        strides_of(operands.do),
        num_tokens, rows.shape[2], mask.window_size or 0, num_programs, section, scale,
        H=num_heads, G=num_kv_heads, K=head_dim, BK=block_k,
        BT=tile.block_t, BS=tile.block_s, TMA=use_descriptors, PACKED=mask.is_packed, WINDOW=mask.has_window,
        IN_REGISTERS=tile.in_registers,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dk, dv
