"""Warp-specialized Hopper dQ and dR, (7) to (10) and (13) of `parallax.reference`, in Gluon.

The first pass of `parallax.kernels.backward`; producer and consumers are those of
`parallax.kernels.hopper_queries`. The reference key of (13) is the mean key of a row's last tile, which holds
its earliest keys. Queries stay in registers, because the tensor cores would wait for shared memory otherwise.
Serves head widths up to 64: at 128 registers suffice only for tiles of 32 keys, or of 64 with addresses
spilled to local memory, and the portable Triton kernel is faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from parallax.kernels.addressing import DQDR_CACHE_BYTES, LOG2E, Mask, heads_per_section, strides_of
from parallax.kernels.hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    describe,
    make_work_queue,
    new_barriers,
    new_tile_slots,
    receive_work_tile,
)
from parallax.kernels.hopper_queries import is_visible, locate_queries, produce_tiles, row_bounds, skip_tiles
from parallax.kernels.row_sums import PTX_COLUMNS, ptx_row_sums, round_tile
from parallax.kernels.tiles import Tile


@gluon.jit
def _row_constants(
    rows_in, rows, i_b, i_h, i_w, T, T_padded, scale, BK: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Return lse in base 2, 1 + tbar, b and b - T of 64 rows, and store the second pass's row constants."""
    do, o, vbar, lse, tbar, do_strides, o_strides = rows_in
    BLOCK: tl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])
    o_r = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, BLOCK)), 1)
    o_c = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(0, BLOCK)), 0)
    m_x = (i_w + o_r < T) & (o_c < K)
    # [ROWS, BK]
    p_do = tl.cast(i_b, tl.int64) * do_strides[0] + tl.cast(i_h, tl.int64) * do_strides[2]
    p_o = tl.cast(i_b, tl.int64) * o_strides[0] + tl.cast(i_h, tl.int64) * o_strides[2]
    b_do = gl.load(do + p_do + (i_w + o_r).to(tl.int64) * do_strides[1] + o_c, mask=m_x, other=0.0)
    b_o = gl.load(o + p_o + (i_w + o_r).to(tl.int64) * o_strides[1] + o_c, mask=m_x, other=0.0)
    b_vbar = gl.load(vbar + p_o + (i_w + o_r).to(tl.int64) * o_strides[1] + o_c, mask=m_x, other=0.0)
    # [ROWS]
    o_t = i_w + gl.arange(0, ROWS, ROW)
    i_bh = tl.cast(i_b * H + i_h, tl.int64)
    b_lse = gl.load(lse + i_bh * T + o_t, mask=o_t < T, other=0.0) * LOG2E
    b_t1 = gl.load(tbar + i_bh * T + o_t, mask=o_t < T, other=0.0) + 1.0
    b_do = b_do.to(tl.float32)
    b_b = gl.sum(b_do * b_vbar.to(tl.float32), 1)
    b_e = gl.convert_layout(b_b - gl.sum(b_do * b_o.to(tl.float32), 1), ROW)
    b_b = gl.convert_layout(b_b, ROW)
    p_rows = rows + i_bh * 4 * T_padded + o_t
    gl.store(p_rows, b_lse, mask=o_t < T_padded)
    gl.store(p_rows + T_padded, b_t1 * scale, mask=o_t < T_padded)
    gl.store(p_rows + 2 * T_padded, b_b / scale, mask=o_t < T_padded)
    gl.store(p_rows + 3 * T_padded, b_e, mask=o_t < T_padded)
    return b_lse, b_t1, b_b, b_e


@gluon.jit
def _add_tile(
    a_q, r, do, k, v, v_full, i_phase, i_s, o_t, b_first, b_rows, b_dq, b_dr, b_g_sum, b_u_sum, b_zero,
    scale_log2, q_empty, is_last, is_masked, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dQ / scale and -dR, and to the row sums of the rounded G and -U.

    After the scores of the last tile the query operands are released.
    """
    LEFT: tl.constexpr = gl.DotOperandLayout(0, b_dq.type.layout, 2)
    b_lse, b_t1, b_b, b_e = b_rows
    # [ROWS, BS]
    b_s = warpgroup_mma(a_q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_t = warpgroup_mma(r, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full, i_phase)
    b_a = warpgroup_mma(do, v.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(2, deps=(b_s,))
    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_lse, 1))
    b_t = warpgroup_mma_wait(1, deps=(b_t,))
    b_t = gl.expand_dims(b_t1, 1) - b_t
    if is_masked:
        m_s = is_visible(b_zero, i_s, o_t, b_first, BOUNDED)
        b_p = gl.where(m_s, b_p, 0.0)
        b_t = gl.where(m_s, b_t, 0.0)
    b_a = warpgroup_mma_wait(0, deps=(b_a,))
    mbarrier.arrive(q_empty, count=1, pred=is_last)
    b_u = b_p * (b_a - gl.expand_dims(b_b, 1))
    b_u_low = round_tile(b_u, k.dtype, PTX_COLUMNS)
    # [ROWS, BK]
    b_dr = warpgroup_mma(gl.convert_layout(b_u_low, LEFT), k, b_dr, is_async=True)
    b_g = round_tile(b_t * b_u + b_p * gl.expand_dims(b_e, 1), k.dtype, PTX_COLUMNS)
    b_dq = warpgroup_mma(gl.convert_layout(b_g, LEFT), k, b_dq, is_async=True)
    b_g_sum += ptx_row_sums(b_g)
    b_u_sum += ptx_row_sums(b_u_low)
    b_dq, b_dr = warpgroup_mma_wait(0, deps=(b_dq, b_dr))
    return b_dq, b_dr, b_g_sum, b_u_sum


@gluon.jit
def _remove_row_sum(b_dx, b_sum, k, num_keys):
    """Return dX minus the row sums times a tile's mean key, (13), each sum split into two 16-bit numbers.

    Rows of the tile past the first num_keys are zero.
    """
    BS: tl.constexpr = k.shape[0]
    LEFT: tl.constexpr = gl.DotOperandLayout(0, b_dx.type.layout, 2)
    b_x = gl.convert_layout(gl.sum(b_sum, 1) * (-1.0 / num_keys), gl.SliceLayout(1, LEFT))
    b_high = b_x.to(k.dtype)
    b_low = (b_x - b_high.to(tl.float32)).to(k.dtype)
    b_zero = gl.zeros([ROWS, BS], k.dtype, LEFT)
    b_dx = warpgroup_mma(gl.expand_dims(b_high, 1) + b_zero, k, b_dx, is_async=True)
    return warpgroup_mma(gl.expand_dims(b_low, 1) + b_zero, k, b_dx, is_async=True)


@gluon.jit
def _consume(
    WARPGROUP: tl.constexpr, queries, keys, gradients, rest, H: tl.constexpr, K: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Compute and store the dQ and dR rows of a consumer warpgroup."""
    BOUNDED: tl.constexpr = PACKED or WINDOW
    operands, q_full, q_empty = queries
    q_buffers, r_buffers, do_buffers = operands
    k, v, k_full, v_full, empty = keys
    dq, dr = gradients
    tile_slots, schedule, outputs, mask, rows_in, rows, T_padded, scale = rest
    dq_out, dr_out = outputs
    _, T, _ = mask
    STAGES: tl.constexpr = k.shape[0]
    BS: tl.constexpr = k.shape[1]
    BK: tl.constexpr = k.shape[2]
    # a warpgroup's diagonal tiles; those of the first come after those of the second
    NUM_DIAGONAL: tl.constexpr = ROWS // BS
    NUM_SKIPPED: tl.constexpr = (1 - WARPGROUP) * NUM_DIAGONAL
    gl.static_assert(ROWS % BS == 0)
    gl.static_assert(STAGES > NUM_DIAGONAL, "the ring holds the skipped tiles and the next one at once")
    SCORES: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    ACC: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    ROW: tl.constexpr = gl.SliceLayout(1, SCORES)
    b_zero = gl.zeros([ROWS, BS], tl.float32, SCORES)
    b_zero_sum = ptx_row_sums(round_tile(b_zero, k.dtype, PTX_COLUMNS))
    scale_log2 = scale * LOG2E
    num_work_tiles, _, _ = schedule
    i_n = 0  # work tiles so far
    i_x = 0  # tiles of keys so far
    i_work_tile = receive_work_tile(tile_slots, i_n)
    while i_work_tile < num_work_tiles:
        i_b, i_h, i_t, num_steps = locate_queries(i_work_tile, schedule, mask, BS, H, PACKED, WINDOW)
        i_w = i_t + WARPGROUP * ROWS
        b_rows = _row_constants(rows_in, rows, i_b, i_h, i_w, T, T_padded, scale, BK, H, K, ROW)
        o_t = i_w + gl.arange(0, ROWS, ROW)
        b_first, i_last, i_hidden = row_bounds(mask, o_t, i_t, i_w, num_steps, BS, PACKED, WINDOW)
        i_buffer = i_n % 2 * 2 + WARPGROUP
        b_dq = gl.zeros([ROWS, BK], tl.float32, ACC)
        b_dr = gl.zeros([ROWS, BK], tl.float32, ACC)
        b_g_sum = b_zero_sum
        b_u_sum = b_zero_sum

        skip_tiles(keys, i_x, i_x + NUM_SKIPPED)
        mbarrier.wait(q_full.index(i_buffer), (i_n // 2) & 1)
        a_q = q_buffers.index(i_buffer).load(gl.DotOperandLayout(0, SCORES, 2))
        # diagonal tiles, then the others; one loop for both where any tile may hold the start of a document
        i_diagonal_end = i_x + NUM_SKIPPED + NUM_DIAGONAL
        i_end = i_x + i_last
        zones = (i_x + NUM_SKIPPED, i_end if BOUNDED else i_diagonal_end, i_end)
        for ZONE in gl.static_range(1 if BOUNDED else 2):
            for i_y in range(zones[ZONE], zones[ZONE + 1]):
                i_stage = i_y % STAGES
                i_phase = (i_y // STAGES) & 1
                i_s = i_t + 2 * ROWS - (i_y - i_x + 1) * BS
                is_last = i_y == i_end - 1
                is_masked = ZONE == 0
                if BOUNDED:
                    is_masked = (i_y < i_diagonal_end) | (i_s < i_hidden)
                mbarrier.wait(k_full.index(i_stage), i_phase)
                b_dq, b_dr, b_g_sum, b_u_sum = _add_tile(
                    a_q, r_buffers.index(i_buffer), do_buffers.index(i_buffer), k.index(i_stage),
                    v.index(i_stage), v_full.index(i_stage), i_phase, i_s, o_t, b_first, b_rows, b_dq, b_dr,
                    b_g_sum, b_u_sum, b_zero, scale_log2, q_empty.index(i_buffer), is_last, is_masked,
                    BOUNDED,
                )  # fmt: skip
                mbarrier.arrive(empty.index(i_stage), count=1, pred=i_y < i_end - 1)
        i_stage = (i_end - 1) % STAGES
        num_keys = tl.minimum(BS, T - (i_t + 2 * ROWS - i_last * BS))
        b_dq = _remove_row_sum(b_dq, b_g_sum, k.index(i_stage), num_keys)
        b_dr = _remove_row_sum(b_dr, b_u_sum, k.index(i_stage), num_keys)
        b_dq, b_dr = warpgroup_mma_wait(0, deps=(b_dq, b_dr))
        mbarrier.arrive(empty.index(i_stage), count=1)
        # tiles that only the other warpgroup sees
        skip_tiles(keys, i_end, i_x + num_steps)
        i_x += num_steps

        tma.store_wait(0)
        dq.index(WARPGROUP).store((b_dq * scale).to(k.dtype))
        dr.index(WARPGROUP).store((-b_dr).to(k.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_out, [i_b, i_h, i_w, 0], dq.index(WARPGROUP))
        tma.async_copy_shared_to_global(dr_out, [i_b, i_h, i_w, 0], dr.index(WARPGROUP))
        i_n += 1
        i_work_tile = receive_work_tile(tile_slots, i_n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "T_padded", "window_size", "num_work_tiles", "num_heads", "section"])
def _parallax_bwd_dqdr_hopper_kernel(
    q_in, r_in, do_in, k_in, v_in, dq_out, dr_out, do, o, vbar, lse, tbar, rows, do_strides, o_strides, first,
    counter, T, T_padded, window_size, num_work_tiles, num_heads, section, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Compute dQ and dR of work tiles, 128 rows of one head, until the work queue is empty."""
    dtype: tl.constexpr = q_in.dtype
    operands = (
        gl.allocate_shared_memory(dtype, [4, ROWS, BK], q_in.layout),
        gl.allocate_shared_memory(dtype, [4, ROWS, BK], r_in.layout),
        gl.allocate_shared_memory(dtype, [4, ROWS, BK], do_in.layout),
    )
    gradients = (
        gl.allocate_shared_memory(dtype, [2, ROWS, BK], dq_out.layout),
        gl.allocate_shared_memory(dtype, [2, ROWS, BK], dr_out.layout),
    )
    k = gl.allocate_shared_memory(dtype, [STAGES, BS, BK], k_in.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, BS, BK], v_in.layout)
    queries = (operands, new_barriers(4, 1), new_barriers(4, 1))
    keys = (k, v, new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(STAGES, 2))
    tile_slots = new_tile_slots()
    fence_async_shared()
    schedule = (num_work_tiles, num_heads, section)
    inputs = ((q_in, r_in, do_in), k_in, v_in)
    outputs = (dq_out, dr_out)
    mask = (first, T, window_size)
    rows_in = (do, o, vbar, lse, tbar, do_strides, o_strides)
    rest = (tile_slots, schedule, outputs, mask, rows_in, rows, T_padded, scale)
    gl.warp_specialize(
        [
            (_consume, (0, queries, keys, gradients, rest, H, K, PACKED, WINDOW)),
            (_consume, (1, queries, keys, gradients, rest, H, K, PACKED, WINDOW)),
            (
                produce_tiles,
                (queries, keys, tile_slots, schedule, mask, inputs, counter, H, H // G, PACKED, WINDOW),
            ),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def query_gradients(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    o: Tensor,
    vbar: Tensor,
    lse: Tensor,
    tbar: Tensor,
    mask: Mask,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dQ, dR and the row constants: launch the warp-specialized first pass.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16, K at most 64; all five such that `can_use_descriptors` holds.
        r: Probes `[B, T, H, K]`.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        do: Gradient of the output `[B, T, H, K]`.
        o: From the forward, as are the next three.
        vbar: Softmax attention `[B, T, H, K]`.
        lse: `[B, H, T]` fp32.
        tbar: `[B, H, T]` fp32.
        mask: Which keys queries see.
        scale: Factor of q.k.
        tile: Its block_s is the keys in a tile, its num_stages the stages of the ring buffer; it has 128
            rows, their queries in registers.

    Returns:
        As `parallax.kernels.backward.query_gradients`.
    """
    assert (tile.block_t, tile.sums) == (2 * ROWS.value, PTX_COLUMNS.value), "the kernel has no other tile"
    batch_size, num_tokens, num_heads, head_dim = q.shape
    dq, dr = (torch.empty(o.shape, dtype=o.dtype, device=o.device) for _ in range(2))
    num_rows = triton.cdiv(num_tokens, ROWS.value) * ROWS.value
    rows = torch.empty(batch_size * num_heads, 4, num_rows, dtype=torch.float32, device=o.device)
    block_k = triton.next_power_of_2(head_dim)
    q_in, r_in, do_in, dq_out, dr_out = (describe(x, ROWS.value, block_k) for x in (q, r, do, dq, dr))
    k_in, v_in = (describe(x, tile.block_s, block_k) for x in (k, v))
    num_work_tiles = triton.cdiv(num_tokens, 2 * ROWS.value) * batch_size * num_heads
    streamed = 2 * mask.reach(num_tokens) * head_dim * k.element_size()
    section = heads_per_section(batch_size * num_heads, num_heads // k.shape[2], streamed, DQDR_CACHE_BYTES)
    num_programs, counter = make_work_queue(num_work_tiles, q.device)
    _parallax_bwd_dqdr_hopper_kernel[(num_programs,)](
        q_in, r_in, do_in, k_in, v_in, dq_out, dr_out, do, o, vbar, lse, tbar, rows, strides_of(do),
        strides_of(o), mask.first, counter, num_tokens, num_rows, mask.window_size or 0, num_work_tiles,
        batch_size * num_heads, section, scale,
        H=num_heads, G=k.shape[2], K=head_dim, BK=block_k, BS=tile.block_s, STAGES=tile.num_stages,
        PACKED=mask.is_packed, WINDOW=mask.has_window, num_warps=4,
    )  # fmt: skip
    return dq, dr, rows
