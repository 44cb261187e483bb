"""Warp-specialized Hopper dQ of softmax attention, (9'), (10) and (13) of `parallax.reference`, in Gluon.

Producer and consumers are those of `parallax.kernels.hopper_queries`. Queries and dO stay in registers, so
one set of them in shared memory suffices. A consumer computes G of a tile while the tensor cores multiply the
previous tile's G by its keys. The reference key of (13) is the mean key of a row's last tile, which holds its
earliest keys.
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
from parallax.kernels.hopper_dqdr import _remove_row_sum
from parallax.kernels.hopper_queries import is_visible, locate_queries, produce_tiles, row_bounds, skip_tiles
from parallax.kernels.row_sums import PTX_COLUMNS, ptx_row_sums, round_tile
from parallax.kernels.tiles import Tile


@gluon.jit
def _row_constants(
    rows_in, rows, i_b, i_h, i_w, T, T_padded, BK: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Return lse in base 2 and T of 64 rows, and store them for the second pass."""
    do, o, lse, do_strides, o_strides = rows_in
    BLOCK: tl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])
    o_r = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, BLOCK)), 1)
    o_c = gl.expand_dims(gl.arange(0, BK, gl.SliceLayout(0, BLOCK)), 0)
    m_x = (i_w + o_r < T) & (o_c < K)
    # [ROWS, BK]
    p_do = tl.cast(i_b, tl.int64) * do_strides[0] + tl.cast(i_h, tl.int64) * do_strides[2]
    p_o = tl.cast(i_b, tl.int64) * o_strides[0] + tl.cast(i_h, tl.int64) * o_strides[2]
    b_do = gl.load(do + p_do + (i_w + o_r).to(tl.int64) * do_strides[1] + o_c, mask=m_x, other=0.0)
    b_o = gl.load(o + p_o + (i_w + o_r).to(tl.int64) * o_strides[1] + o_c, mask=m_x, other=0.0)
    # [ROWS]
    o_t = i_w + gl.arange(0, ROWS, ROW)
    i_bh = tl.cast(i_b * H + i_h, tl.int64)
    b_lse = gl.load(lse + i_bh * T + o_t, mask=o_t < T, other=0.0) * LOG2E
    b_total = gl.convert_layout(gl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1), ROW)
    p_rows = rows + i_bh * 2 * T_padded + o_t
    gl.store(p_rows, b_lse, mask=o_t < T_padded)
    gl.store(p_rows + T_padded, b_total, mask=o_t < T_padded)
    return b_lse, b_total


@gluon.jit
def _add_tile(
    a_q, a_do, keys, i_y, i_s, o_t, b_first, b_rows, b_zero, state, is_masked, scale_log2,
    IS_FIRST: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Compute the rounded G of one key tile and its row sums; add the previous tile to dQ / scale."""
    a_g, b_dq, b_sum = state
    b_lse, b_total = b_rows
    k, v, k_full, v_full, k_empty, v_empty = keys
    STAGES: tl.constexpr = k.shape[0]
    LEFT: tl.constexpr = gl.DotOperandLayout(0, b_dq.type.layout, 2)
    i_previous = (i_y - 1) % STAGES
    i_stage = i_y % STAGES
    i_phase = (i_y // STAGES) & 1
    # [ROWS, BS]
    mbarrier.wait(k_full.index(i_stage), i_phase)
    b_s = warpgroup_mma(a_q, k.index(i_stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(i_stage), i_phase)
    b_a = warpgroup_mma(a_do, v.index(i_stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    if not IS_FIRST:
        # [ROWS, BK]
        b_dq = warpgroup_mma(a_g, k.index(i_previous), b_dq, is_async=True)
    b_s = warpgroup_mma_wait(1 if IS_FIRST else 2, deps=(b_s,))
    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_lse, 1))
    if is_masked:
        b_p = gl.where(is_visible(b_zero, i_s, o_t, b_first, BOUNDED), b_p, 0.0)
    b_a = warpgroup_mma_wait(0 if IS_FIRST else 1, deps=(b_a,))
    mbarrier.arrive(v_empty.index(i_stage), count=1)
    b_g = round_tile(b_p * (b_a - gl.expand_dims(b_total, 1)), k.dtype, PTX_COLUMNS)
    b_sum += ptx_row_sums(b_g)
    if not IS_FIRST:
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
        mbarrier.arrive(k_empty.index(i_previous), count=1)
    return gl.convert_layout(b_g, LEFT), b_dq, b_sum


@gluon.jit
def _consume(
    WARPGROUP: tl.constexpr, queries, keys, dq, rest, H: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Compute and store the dQ rows of a consumer warpgroup."""
    BOUNDED: tl.constexpr = PACKED or WINDOW
    operands, q_full, q_empty = queries
    k, _, _, _, k_empty, _ = keys
    tile_slots, schedule, dq_out, mask, rows_in, rows, T_padded, scale = rest
    _, T, _ = mask
    dtype: tl.constexpr = k.dtype
    STAGES: tl.constexpr = k.shape[0]
    BS: tl.constexpr = k.shape[1]
    BK: tl.constexpr = k.shape[2]
    # key tiles run backwards from the last row: of 64 keys, the first warpgroup's diagonal tile is the second
    NUM_SKIPPED: tl.constexpr = (1 - WARPGROUP) * ROWS // BS
    gl.static_assert(BS == ROWS or BS == 2 * ROWS)
    gl.static_assert(STAGES >= 2, "the keys of the previous tile are still in use")
    SCORES: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    ACC: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    ROW: tl.constexpr = gl.SliceLayout(1, SCORES)
    b_zero = gl.zeros([ROWS, BS], tl.float32, SCORES)
    b_zero_g = round_tile(b_zero, dtype, PTX_COLUMNS)
    b_zero_sum = ptx_row_sums(b_zero_g)
    a_zero_g = gl.convert_layout(b_zero_g, gl.DotOperandLayout(0, ACC, 2))
    scale_log2 = scale * LOG2E
    num_work_tiles, _, _ = schedule
    i_n = 0  # work tiles so far
    i_x = 0  # tiles of keys so far
    i_work_tile = receive_work_tile(tile_slots, i_n)
    while i_work_tile < num_work_tiles:
        i_b, i_h, i_t, num_steps = locate_queries(i_work_tile, schedule, mask, BS, H, PACKED, WINDOW)
        i_w = i_t + WARPGROUP * ROWS
        b_lse, b_total = _row_constants(rows_in, rows, i_b, i_h, i_w, T, T_padded, BK, H, K, ROW)
        o_t = i_w + gl.arange(0, ROWS, ROW)
        b_first, i_last, i_hidden = row_bounds(mask, o_t, i_t, i_w, num_steps, BS, PACKED, WINDOW)

        skip_tiles(keys, i_x, i_x + NUM_SKIPPED)
        mbarrier.wait(q_full.index(WARPGROUP), i_n & 1)
        a_q = operands[0].index(WARPGROUP).load(gl.DotOperandLayout(0, SCORES, 2))
        a_do = operands[1].index(WARPGROUP).load(gl.DotOperandLayout(0, SCORES, 2))
        # otherwise the next operands, written by the async proxy, may overwrite what slower warps load
        fence_async_shared()
        mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        # the diagonal tile, then the others
        i_diagonal = i_x + NUM_SKIPPED
        i_end = tl.maximum(i_x + i_last, i_diagonal + 1)
        b_rows = (b_lse, b_total)
        state = (a_zero_g, gl.zeros([ROWS, BK], tl.float32, ACC), b_zero_sum)
        state = _add_tile(
            a_q, a_do, keys, i_diagonal, i_t + 2 * ROWS - (NUM_SKIPPED + 1) * BS, o_t, b_first, b_rows,
            b_zero, state, True, scale_log2, True, BOUNDED,
        )  # fmt: skip
        # every tile is masked from the first one on that some row does not see entirely
        i_masked = i_end
        if BOUNDED:
            i_masked = i_x + (i_t + 2 * ROWS - i_hidden) // BS
            i_masked = tl.minimum(tl.maximum(i_masked, i_diagonal + 1), i_end)
        zones = (i_diagonal + 1, i_masked, i_end)
        for ZONE in gl.static_range(2 if BOUNDED else 1):
            for i_y in range(zones[ZONE], zones[ZONE + 1]):
                i_s = i_t + 2 * ROWS - (i_y - i_x + 1) * BS
                state = _add_tile(
                    a_q, a_do, keys, i_y, i_s, o_t, b_first, b_rows, b_zero, state, ZONE == 1, scale_log2,
                    False, BOUNDED,
                )  # fmt: skip
        a_g, b_dq, b_sum = state
        i_stage = (i_end - 1) % STAGES
        num_keys = tl.minimum(BS, T - (i_t + 2 * ROWS - (i_end - i_x) * BS))
        b_dq = warpgroup_mma(a_g, k.index(i_stage), b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
        b_dq = warpgroup_mma_wait(0, deps=(_remove_row_sum(b_dq, b_sum, k.index(i_stage), num_keys),))
        mbarrier.arrive(k_empty.index(i_stage), count=1)
        # tiles that only the other warpgroup sees
        skip_tiles(keys, i_end, i_x + num_steps)
        i_x += num_steps

        tma.store_wait(0)
        dq.index(WARPGROUP).store((b_dq * scale).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_out, [i_b, i_h, i_w, 0], dq.index(WARPGROUP))
        i_n += 1
        i_work_tile = receive_work_tile(tile_slots, i_n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "T_padded", "window_size", "num_work_tiles", "num_heads", "section"])
def _softmax_bwd_dq_hopper_kernel(
    q_in, do_in, k_in, v_in, dq_out, do, o, lse, rows, do_strides, o_strides, first, counter,
    T, T_padded, window_size, num_work_tiles, num_heads, section, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Compute dQ of work tiles, 128 rows of one head, until the work queue is empty."""
    dtype: tl.constexpr = q_in.dtype
    operands = (
        gl.allocate_shared_memory(dtype, [2, ROWS, BK], q_in.layout),
        gl.allocate_shared_memory(dtype, [2, ROWS, BK], do_in.layout),
    )
    dq = gl.allocate_shared_memory(dtype, [2, ROWS, BK], dq_out.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, BS, BK], k_in.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, BS, BK], v_in.layout)
    queries = (operands, new_barriers(2, 1), new_barriers(2, 1))
    k_full = new_barriers(STAGES, 1)
    v_full = new_barriers(STAGES, 1)
    keys = (k, v, k_full, v_full, new_barriers(STAGES, 2), new_barriers(STAGES, 2))
    tile_slots = new_tile_slots()
    fence_async_shared()
    schedule = (num_work_tiles, num_heads, section)
    inputs = ((q_in, do_in), k_in, v_in)
    mask = (first, T, window_size)
    rows_in = (do, o, lse, do_strides, o_strides)
    rest = (tile_slots, schedule, dq_out, mask, rows_in, rows, T_padded, scale)
    gl.warp_specialize(
        [
            (_consume, (0, queries, keys, dq, rest, H, K, PACKED, WINDOW)),
            (_consume, (1, queries, keys, dq, rest, H, K, PACKED, WINDOW)),
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
    k: Tensor,
    v: Tensor,
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dQ and the row constants: launch the warp-specialized first pass.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16, K at most 128; all four such that `can_use_descriptors` holds.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        do: Gradient of the output `[B, T, H, K]`.
        o: From the forward.
        lse: `[B, H, T]` fp32, from the forward.
        mask: Which keys queries see.
        scale: Factor of q.k.
        tile: Its block_s is the keys in a tile, 64 or 128, its num_stages the stages of the ring buffer; it
            has 128 rows, their queries and dO in registers.

    Returns:
        As `parallax.kernels.backward.query_gradients` without probes.
    """
    assert (tile.block_t, tile.in_registers, tile.sums) == (2 * ROWS.value, 2, PTX_COLUMNS.value)
    batch_size, num_tokens, num_heads, head_dim = q.shape
    dq = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    num_rows = triton.cdiv(num_tokens, ROWS.value) * ROWS.value
    rows = torch.empty(batch_size * num_heads, 2, num_rows, dtype=torch.float32, device=o.device)
    block_k = triton.next_power_of_2(head_dim)
    q_in, do_in, dq_out = (describe(x, ROWS.value, block_k) for x in (q, do, dq))
    k_in, v_in = (describe(x, tile.block_s, block_k) for x in (k, v))
    num_work_tiles = triton.cdiv(num_tokens, 2 * ROWS.value) * batch_size * num_heads
    streamed = 2 * mask.reach(num_tokens) * head_dim * k.element_size()
    section = heads_per_section(batch_size * num_heads, num_heads // k.shape[2], streamed, DQDR_CACHE_BYTES)
    num_programs, counter = make_work_queue(num_work_tiles, q.device)
    _softmax_bwd_dq_hopper_kernel[(num_programs,)](
        q_in, do_in, k_in, v_in, dq_out, do, o, lse, rows, strides_of(do), strides_of(o), mask.first, counter,
        num_tokens, num_rows, mask.window_size or 0, num_work_tiles, batch_size * num_heads, section, scale,
        H=num_heads, G=k.shape[2], K=head_dim, BK=block_k, BS=tile.block_s, STAGES=tile.num_stages,
        PACKED=mask.is_packed, WINDOW=mask.has_window, num_warps=4,
    )  # fmt: skip
    return dq, o.new_empty(0), rows
