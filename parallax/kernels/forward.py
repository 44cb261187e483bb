"""Forward kernel of Parallax and softmax attention, (1) to (6) and (12) of `parallax.reference`.

One pass over keys and values with a running maximum m of the base-2 logits s:

    P1 = 2^(s - m),  P2 = P1 (t - c),  d1 = sum P1,  d2 = sum P2,  O1 = P1 V,  O2 = P2 V,
    vbar = O1 / d1,  tbar = c + d2 / d1,  o = (O1 (1 + d2 / d1) - O2) / d1.

c_i is the weighted mean of t over the first tile in which query i sees a key, computed in fp32 before that
tile's P2 is rounded. Diagonal tiles come first, so that every row computes its c there.

Without probes (PROBES false: softmax attention) there are no P2, d2, O2, vbar and tbar, and o = O1 / d1.

d1 and d2 sum the rounded P1 and P2, as the products read them (`parallax.kernels.row_sums`): the weights of o
then sum to one whatever the rounding. lse and tbar are of the rounded weights too: in 16 bits the error of
lse is up to half a unit of rounding, 2^-9 in bf16.

fp32 factors are split in two for the tensor cores ("tf32x3", here and in the backward): three products with a
relative error of at most 2^-20 per term; tiles are summed in fp32. 16-bit factors are not affected.

Outputs: o in the dtype of the inputs, lse and tbar in fp32, and vbar in the dtype of the inputs if a backward
follows. That needs dO.vbar, and o does not determine vbar; saving it takes as much memory as o, recomputing
it would take the backward another quarter of its products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallax.kernels.addressing import (
    LN2,
    LOG2E,
    Mask,
    can_use_descriptors,
    describe,
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
from parallax.kernels.tiles import Tile, num_columns, tile_of


@triton.jit
def _attend_tile(
    b_q, b_r, k, v, k_strides, v_strides, i_b, i_g, i_s, o_t, b_first, state, T, scale_log2,
    BS: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
    BOUNDED: tl.constexpr, CENTRED: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the sums of (6)."""
    if PROBES:
        b_m, b_c, b_d1, b_d2, b_o1, b_o2 = state
    else:
        b_m, b_d1, b_o1 = state
    # [BS, BK]
    b_k = load_tile(k, k_strides, i_b, i_g, i_s, T, BS, BK, K, TMA)
    b_v = load_tile(v, v_strides, i_b, i_g, i_s, T, BS, BK, K, TMA)
    # [BT, BS]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
    if PROBES:
        b_t = tl.dot(b_r, tl.trans(b_k), input_precision="tf32x3")
    if MASKED:
        o_s = i_s + tl.arange(0, BS)
        m_s = o_s[None, :] <= o_t[:, None]
        if BOUNDED:
            m_s = m_s & (o_s[None, :] >= b_first[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        if PROBES:
            b_t = tl.where(m_s, b_t, 0.0)
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
    b_alpha = tl.math.exp2(b_m - b_m_new)
    b_p1 = tl.math.exp2(b_s * scale_log2 - b_m_new[:, None])
    if MASKED and CENTRED and PROBES:
        b_sum = tl.sum(b_p1, 1)
        # rows that see their first keys in this tile; the largest weight makes their sum at least one half
        is_first = (tl.max(b_d1, 1) == 0.0) & (b_sum > 0.0)
        b_c = tl.where(is_first, tl.sum(b_p1 * b_t, 1) / tl.maximum(b_sum, 0.5), b_c)
    if PROBES:
        b_p2 = round_tile(b_p1 * (b_t - b_c[:, None]), b_v.dtype, b_d2.shape[1])
    b_p1 = round_tile(b_p1, b_v.dtype, b_d1.shape[1])
    # [BT, BK]
    b_o1 = tl.dot(b_p1, b_v, b_o1 * b_alpha[:, None], input_precision="tf32x3")
    if PROBES:
        b_o2 = tl.dot(b_p2, b_v, b_o2 * b_alpha[:, None], input_precision="tf32x3")
    b_d1 = add_row_sums(b_p1, b_d1 * b_alpha[:, None])
    if PROBES:
        b_d2 = add_row_sums(b_p2, b_d2 * b_alpha[:, None])
        state = (b_m_new, b_c, b_d1, b_d2, b_o1, b_o2)
    else:
        state = (b_m_new, b_d1, b_o1)
    return state


@triton.jit(do_not_specialize=["T", "window_size", "num_heads", "section"])
def _parallax_fwd_kernel(
    q, r, k, v, o, vbar, lse, tbar, first, q_strides, r_strides, k_strides, v_strides,
    T, window_size, num_heads, section, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    TMA: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, SAVE_VBAR: tl.constexpr,
    CENTRED: tl.constexpr, IN_REGISTERS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Compute BT output rows of one head per program."""
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
    b_q = load_tile(q, q_strides, i_b, i_h, i_t, T, BT, BK, K, TMA)
    b_r = None
    if PROBES:
        b_r = load_tile(r, r_strides, i_b, i_h, i_t, T, BT, BK, K, TMA)
    if IN_REGISTERS >= 1:
        b_q = in_registers(b_q, BK)
    if PROBES and IN_REGISTERS == 2:
        b_r = in_registers(b_r, BK)
    b_first = o_t
    if BOUNDED:
        b_first = first_key(first, o_t, T, window_size, PACKED, WINDOW)
    i_first, i_unmasked, i_diagonal = key_bounds(first, i_t, T, window_size, BT, BS, PACKED, WINDOW)

    # a finite initial maximum: inf - inf would be NaN in a row that sees no key of a tile
    b_m = tl.full([BT], -1.0e30, tl.float32)
    b_c = tl.zeros([BT], tl.float32)
    b_d = tl.zeros([BT, SUMS], tl.float32)
    b_o = tl.zeros([BT, BK], tl.float32)
    state = (b_m, b_c, b_d, b_d, b_o, b_o) if PROBES else (b_m, b_d, b_o)
    num_diagonal = tl.cdiv(tl.minimum(i_t + BT, T) - i_diagonal, BS)
    # disable_licm: otherwise hoisted addresses of loop-invariant operands cause register spills
    for i_x in tl.range(0, num_diagonal + (i_unmasked - i_first) // BS, disable_licm=True):
        i_s = tl.where(i_x < num_diagonal, i_diagonal + i_x * BS, i_first + (i_x - num_diagonal) * BS)
        state = _attend_tile(
            b_q, b_r, k, v, k_strides, v_strides, i_b, i_g, i_s, o_t, b_first, state, T, scale_log2,
            BS, BK, K, TMA, True, BOUNDED, CENTRED, PROBES,
        )  # fmt: skip
    for i_s in tl.range(i_unmasked, i_diagonal, BS, disable_licm=True):
        state = _attend_tile(
            b_q, b_r, k, v, k_strides, v_strides, i_b, i_g, i_s, o_t, b_first, state, T, scale_log2,
            BS, BK, K, TMA, False, BOUNDED, CENTRED, PROBES,
        )  # fmt: skip

    if PROBES:
        b_m, b_c, b_d1, b_d2, b_o1, b_o2 = state
    else:
        b_m, b_d1, b_o1 = state
    b_d1 = tl.maximum(total_row_sums(b_d1), 0.5)
    b_inverse = 1.0 / b_d1
    # [BT, BK]
    if PROBES:
        b_shift = total_row_sums(b_d2) * b_inverse
        b_o = (b_o1 * (1.0 + b_shift)[:, None] - b_o2) * b_inverse[:, None]
    else:
        b_o = b_o1 * b_inverse[:, None]
    store_tile(o, b_o, i_b, i_h, i_t, T, H, K, TMA)
    if SAVE_VBAR:
        store_tile(vbar, b_o1 * b_inverse[:, None], i_b, i_h, i_t, T, H, K, TMA)
    p_t = tl.cast(i_bh, tl.int64) * T + o_t
    tl.store(lse + p_t, (b_m + tl.math.log2(b_d1)) * LN2, mask=o_t < T)
    if PROBES:
        tl.store(tbar + p_t, b_c + b_shift, mask=o_t < T)


def forward(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window_size: int | None,
    *,
    save_vbar: bool,
    tile: Tile | None = None,
    use_descriptors: bool | None = None,
    is_centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Parallax or softmax attention by the forward kernel, without host synchronization.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32; read in place if the last dimension is contiguous.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        cu_seqlens: Document bounds `[N + 1]` int32 rising from 0 to T with batch 1, or None.
        scale: Factor of q.k, positive.
        window_size: Number of newest keys that a query sees, its own included; None for all.
        save_vbar: Whether a backward follows, which needs vbar if there are probes.
        tile: Tile to tune; None for that of `parallax.kernels.tiles`.
        use_descriptors: Whether TMA descriptors load the operands, for tuning; None for wherever they can.
        is_centred: Whether to apply (12); False only to measure its cost and accuracy.

    Returns:
        o `[B, T, H, K]` and vbar `[B, T, H, K]` (`[0]` if not saved) in the dtype of q; lse and tbar
        `[B, H, T]` fp32. Without r vbar and tbar are `[0]`.
    """
    q, k, v = (with_contiguous_rows(x) for x in (q, k, v))
    r = None if r is None else with_contiguous_rows(r)
    save_vbar = save_vbar and r is not None
    batch_size, num_tokens, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]
    if use_descriptors is None:
        use_descriptors = can_use_descriptors(*(x for x in (q, r, k, v) if x is not None))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    vbar = torch.empty(q.shape if save_vbar else (0,), dtype=q.dtype, device=q.device)
    lse = torch.empty(batch_size, num_heads, num_tokens, dtype=torch.float32, device=q.device)
    tbar = lse.new_empty(0) if r is None else torch.empty_like(lse)
    if q.numel() == 0:
        return o, vbar, lse, tbar

    mask = Mask.of(cu_seqlens, num_tokens, window_size)
    tile = tile or tile_of(
        "softmax_forward" if r is None else "forward",
        q,
        use_descriptors and is_centred,
        mask.reach(num_tokens),
    )
    if tile.is_specialized:
        from parallax.kernels import hopper_forward, hopper_softmax_forward

        assert is_centred, "the warp-specialized kernel always applies (12)"
        if r is None:
            return o, vbar, hopper_softmax_forward.forward(q, k, v, mask, scale, o, tile=tile), tbar
        return hopper_forward.forward(q, r, k, v, mask, scale, save_vbar=save_vbar, tile=tile)
    use_descriptors = use_descriptors and tile.use_descriptors
    block_k = num_columns(head_dim)
    pairs = ((q, tile.block_t), (r, tile.block_t), (k, tile.block_s), (v, tile.block_s))
    q_in, r_in, k_in, v_in = (
        describe(x, n, block_k) if use_descriptors and x is not None else x for x, n in pairs
    )
    o_out = describe(o, tile.block_t, block_k) if use_descriptors else o
    vbar_out = describe(vbar, tile.block_t, block_k) if use_descriptors and save_vbar else vbar
    num_programs = batch_size * num_heads
    streamed = 2 * mask.reach(num_tokens) * head_dim * k.element_size()
    section = heads_per_section(num_programs, group, streamed)
    _parallax_fwd_kernel[(triton.cdiv(num_tokens, tile.block_t) * num_programs,)](
        q_in, r_in, k_in, v_in, o_out, vbar_out, lse, tbar, mask.first,
        strides_of(q), None if r is None else strides_of(r), strides_of(k), strides_of(v),
        num_tokens, mask.window_size or 0, num_programs, section, scale,
        H=num_heads, G=k.shape[2], K=head_dim, BK=block_k, BT=tile.block_t, BS=tile.block_s, SUMS=tile.sums,
        TMA=use_descriptors, PACKED=mask.is_packed, WINDOW=mask.has_window, SAVE_VBAR=save_vbar,
        CENTRED=is_centred, IN_REGISTERS=tile.in_registers,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return o, vbar, lse, tbar
