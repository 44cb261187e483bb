"""Warp-specialized Hopper dK and dV, (7) to (9') and (11) of `parallax.reference`, in Gluon.

The second pass of `parallax.kernels.backward`, with or without probes. A work tile is 128 keys of one kv
head, 64 per consumer warpgroup; while its epilogue runs, the keys and values of the next one are copied. The
producer warp copies tiles of queries, probes, dO and row constants; both consumers read every tile, which
halves the copies compared with programs of 64 keys. Scores are transposed, so that P^T and the two gradient
tiles stay in registers as left operands. Keys stay in registers too, because the tensor cores would wait for
shared memory otherwise. dK and dV are summed in registers over all query heads of the group, so results are
bit-identical from run to run.

While one consumer computes weights, the products of the other run. Software pipelining within a consumer,
which issues the next tile's products before this tile is done, gains nothing: a tile takes about the time of
its products plus that of every instruction that computes weights.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from parallax.kernels.addressing import (
    LOG2E,
    Mask,
    end_query,
    heads_per_section,
    program_of,
)
from parallax.kernels.hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    describe,
    make_work_queue,
    new_barriers,
    new_tile_slots,
    publish_work_tile,
    receive_work_tile,
)
from parallax.kernels.tiles import Tile

_CONSTANTS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@gluon.jit
def _add_tile(
    a_k, a_v, q, r, do, constants, i_c, i_t, o_s, b_end, is_masked, b_dk, b_dv, b_zero, scale,
    minus_inverse_scale, BT: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add one tile of one head's queries to dK / scale and scale * dV (without probes dV)."""
    PROBES: tl.constexpr = r is not None
    SCORES: tl.constexpr = b_zero.type.layout
    COLUMN: tl.constexpr = gl.SliceLayout(0, SCORES)
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    # [BS, BT]
    b_s = warpgroup_mma(a_k, q.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    if PROBES:
        b_t = warpgroup_mma(a_k, r.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_a = warpgroup_mma(a_v, do.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_lse = constants.index(i_c).load(COLUMN)
    b_s = warpgroup_mma_wait(2 if PROBES else 1, deps=(b_s,))
    b_p = gl.exp2(b_s * (scale * LOG2E) - gl.expand_dims(b_lse, 0))
    if PROBES:
        b_t1 = constants.index(i_c + 1).load(COLUMN)
        b_t = warpgroup_mma_wait(1, deps=(b_t,))
        # scale * (1 + tbar - t), and below (b - a) / scale
        b_t = gl.expand_dims(b_t1, 0) - b_t * scale
    if is_masked:
        o_t = i_t + gl.arange(0, BT, COLUMN)
        m_s = gl.expand_dims(o_s, 1) <= gl.expand_dims(o_t, 0)
        if BOUNDED:
            m_s = m_s & (gl.expand_dims(o_t, 0) < gl.expand_dims(b_end, 1))
        b_p = gl.where(m_s, b_p, 0.0)
        if PROBES:
            b_t = gl.where(m_s, b_t, 0.0)
    b_w = b_p * b_t if PROBES else b_p
    # [BS, BK]
    b_dv = warpgroup_mma(gl.convert_layout(b_w.to(q.dtype), LEFT), do, b_dv, is_async=True)
    if PROBES:
        b_b = constants.index(i_c + 2).load(COLUMN)
        b_e = constants.index(i_c + 3).load(COLUMN)
        b_a = warpgroup_mma_wait(1, deps=(b_a,))
        b_a = b_a * minus_inverse_scale + gl.expand_dims(b_b, 0)
        b_u = b_p * b_a
        b_dk = warpgroup_mma(gl.convert_layout(b_u.to(q.dtype), LEFT), r, b_dk, is_async=True)
        b_g = b_p * (gl.expand_dims(b_e, 0) - b_t * b_a)
    else:
        b_total = constants.index(i_c + 1).load(COLUMN)
        b_a = warpgroup_mma_wait(1, deps=(b_a,))
        b_g = b_p * (b_a - gl.expand_dims(b_total, 0))
    b_dk = warpgroup_mma(gl.convert_layout(b_g.to(q.dtype), LEFT), q, b_dk, is_async=True)
    b_dv, b_dk = warpgroup_mma_wait(0, deps=(b_dv, b_dk))
    return b_dk, b_dv


@gluon.jit
def _consume(
    WARPGROUP: tl.constexpr, buffers, tile_slots, schedule, outputs, mask, scale, G: tl.constexpr,
    GROUP: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Compute and store dK and dV of the keys of a consumer warpgroup."""
    k_buffers, v_buffers, streamed, constants, kv_full, kv_empty, full, empty = buffers
    q = streamed[0]
    do = streamed[-1]
    PROBES: tl.constexpr = len(streamed) == 3
    dk_out, dv_out = outputs
    end, T, window_size = mask
    BOUNDED: tl.constexpr = PACKED or WINDOW
    STAGES: tl.constexpr = q.shape[0]
    COUNT: tl.constexpr = constants.shape[0] // STAGES
    BT: tl.constexpr = q.shape[1]
    BK: tl.constexpr = q.shape[2]
    ACC: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    SCORES: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    b_zero = gl.zeros([ROWS, BT], tl.float32, SCORES)
    # b - a / scale compiles to a negation of every a, b + a * minus_inverse_scale does not
    minus_inverse_scale = -1.0 / scale
    num_work_tiles, _, _ = schedule
    i_n = 0  # work tiles so far
    i_x = 0  # tiles of queries so far
    i_work_tile = receive_work_tile(tile_slots, i_n)
    while i_work_tile < num_work_tiles:
        i_b, i_g, i_s, num_steps = _locate_keys(i_work_tile, schedule, mask, BT, G, PACKED, WINDOW)
        k = k_buffers.index(i_n % 2 * 2 + WARPGROUP)
        v = v_buffers.index(i_n % 2 * 2 + WARPGROUP)
        i_w = i_s + WARPGROUP * ROWS
        o_s = i_w + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        b_end = o_s
        i_end = T
        i_unmasked = T + BT
        if BOUNDED:
            b_end = end_query(end, o_s, T, window_size, PACKED, WINDOW)
            i_end = end_query(end, tl.minimum(i_w + ROWS, T) - 1, T, window_size, PACKED, WINDOW)
            i_unmasked = end_query(end, tl.minimum(i_w, T - 1), T, window_size, PACKED, WINDOW)
        # query tiles that see this warpgroup's keys; the others are released unread
        i_first = tl.minimum((i_w - i_s) // BT, num_steps)
        i_last = tl.maximum(tl.minimum(tl.cdiv(i_end - i_s, BT), num_steps), i_first)

        mbarrier.wait(kv_full.index(i_n % 2), i_n // 2 & 1)
        a_k = k.load(gl.DotOperandLayout(0, SCORES, 2)) if IN_REGISTERS >= 1 else k
        a_v = v.load(gl.DotOperandLayout(0, SCORES, 2)) if IN_REGISTERS == 2 else v
        b_dk = gl.zeros([ROWS, BK], tl.float32, ACC)
        b_dv = gl.zeros([ROWS, BK], tl.float32, ACC)
        for i_h in range(GROUP):
            _skip_tiles(full, empty, i_x, i_x + i_first)
            # diagonal tiles, then the others; one loop for both where any tile may hold the end of a
            # document. Without probes such tiles have a third loop instead: after a branch within the loop,
            # ptxas 12.8 overwrote the registers that hold the keys
            ZONES: tl.constexpr = 2 if not BOUNDED else 1 if PROBES else 3
            i_diagonal_end = i_x + i_last if ZONES == 1 else i_x + tl.minimum(i_first + ROWS // BT, i_last)
            i_unmasked_end = i_x + i_last
            if ZONES == 3:
                i_unmasked_end = tl.minimum(
                    tl.maximum(i_x + (i_unmasked - i_s) // BT, i_diagonal_end), i_unmasked_end
                )
            zones = (i_x + i_first, i_diagonal_end, i_unmasked_end, i_x + i_last)
            for ZONE in gl.static_range(ZONES):
                for i_y in range(zones[ZONE], zones[ZONE + 1]):
                    i_stage = i_y % STAGES
                    mbarrier.wait(full.index(i_stage), (i_y // STAGES) & 1)
                    i_t = i_s + (i_y - i_x) * BT
                    is_masked = ZONE != 1
                    if ZONES == 1:
                        is_masked = (i_t < i_w + ROWS - 1) | (i_t + BT > i_unmasked)
                    b_dk, b_dv = _add_tile(
                        a_k, a_v, q.index(i_stage), streamed[1].index(i_stage) if PROBES else None,
                        do.index(i_stage),
                        constants, i_stage * COUNT, i_t, o_s, b_end, is_masked, b_dk, b_dv, b_zero, scale,
                        minus_inverse_scale, BT, BOUNDED, ACC,
                    )  # fmt: skip
                    mbarrier.arrive(empty.index(i_stage), count=1)
            _skip_tiles(full, empty, i_x + i_last, i_x + num_steps)
            i_x += num_steps
            # the keys of the previous work tile are stored by now
            tma.store_wait(0)
            mbarrier.arrive(kv_empty.index((i_n + 1) % 2), count=1, pred=(i_h == 0) & (i_n > 0))
        # staged in the buffers of the warpgroup's keys and values
        k.store((b_dk * scale).to(k.dtype))
        if PROBES:
            b_dv = b_dv * (1.0 / scale)
        v.store(b_dv.to(v.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dk_out, [i_b, i_g, i_w, 0], k)
        tma.async_copy_shared_to_global(dv_out, [i_b, i_g, i_w, 0], v)
        i_n += 1
        i_work_tile = receive_work_tile(tile_slots, i_n)
    tma.store_wait(0)


@gluon.jit
def _skip_tiles(full, empty, i_first, i_end):
    """Wait for tiles and release them unread."""
    STAGES: tl.constexpr = full.shape[0]
    for i_y in range(i_first, i_end):
        mbarrier.wait(full.index(i_y % STAGES), (i_y // STAGES) & 1)
        mbarrier.arrive(empty.index(i_y % STAGES), count=1)


@gluon.jit
def _produce(
    buffers, tile_slots, schedule, mask, inputs, T_padded, G: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Fetch work tiles; copy their keys and values and all query tiles that see them."""
    k, v, streamed, constants, kv_full, kv_empty, full, empty = buffers
    counter, streamed_in, k_in, v_in, rows_in = inputs
    STAGES: tl.constexpr = full.shape[0]
    COUNT: tl.constexpr = constants.shape[0] // STAGES
    BT: tl.constexpr = constants.shape[1]
    BK: tl.constexpr = k.shape[2]
    num_work_tiles, _, _ = schedule
    i_n = 0
    i_x = 0
    i_work_tile = gl.atomic_add(counter, 1)
    publish_work_tile(tile_slots, i_n, i_work_tile)
    while i_work_tile < num_work_tiles:
        i_b, i_g, i_s, num_steps = _locate_keys(i_work_tile, schedule, mask, BT, G, PACKED, WINDOW)
        i_buffer = i_n % 2
        bar = kv_full.index(i_buffer)
        mbarrier.wait(kv_empty.index(i_buffer), (i_n // 2 & 1) ^ 1)
        mbarrier.expect(bar, 4 * ROWS * BK * 2)
        for i_w in gl.static_range(2):
            place = [i_b, i_g, i_s + i_w * ROWS, 0]
            tma.async_copy_global_to_shared(k_in, place, bar, k.index(i_buffer * 2 + i_w))
            tma.async_copy_global_to_shared(v_in, place, bar, v.index(i_buffer * 2 + i_w))
        for i_y in range(i_x, i_x + num_steps * GROUP):
            i_h = i_g * GROUP + (i_y - i_x) // num_steps
            i_t = i_s + (i_y - i_x) % num_steps * BT
            i_stage = i_y % STAGES
            bar = full.index(i_stage)
            place = [i_b, i_h, i_t, 0]
            mbarrier.wait(empty.index(i_stage), (i_y // STAGES & 1) ^ 1)
            mbarrier.expect(bar, len(streamed) * BT * BK * 2 + COUNT * BT * 4)
            for i_o in gl.static_range(len(streamed)):
                tma.async_copy_global_to_shared(streamed_in[i_o], place, bar, streamed[i_o].index(i_stage))
            for i_c in gl.static_range(COUNT):
                i_row = ((i_b * G * GROUP + i_h) * COUNT + i_c) * T_padded + i_t
                tma.async_copy_global_to_shared(rows_in, [i_row], bar, constants.index(i_stage * COUNT + i_c))
        i_x += num_steps * GROUP
        i_n += 1
        i_work_tile = gl.atomic_add(counter, 1)
        publish_work_tile(tile_slots, i_n, i_work_tile)


@gluon.jit
def _locate_keys(
    i_work_tile, schedule, mask, BT: tl.constexpr, G: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr
):
    """Return batch, kv head and first key of a work tile, and its number of query tiles per head."""
    _, num_heads, section = schedule
    end, T, window_size = mask
    i_rank, i_bg = program_of(i_work_tile, tl.cdiv(T, 2 * ROWS), num_heads, section)
    i_s = i_rank * 2 * ROWS
    i_end = T
    if PACKED or WINDOW:
        i_end = end_query(end, tl.minimum(i_s + 2 * ROWS, T) - 1, T, window_size, PACKED, WINDOW)
    return i_bg // G, i_bg % G, i_s, tl.cdiv(i_end - i_s, BT)


@gluon.jit(do_not_specialize=["T", "T_padded", "window_size", "num_work_tiles", "num_heads", "section"])
def _parallax_bwd_dkdv_hopper_kernel(
    q_in, r_in, k_in, v_in, do_in, rows_in, dk_out, dv_out, end, counter,
    T, T_padded, window_size, num_work_tiles, num_heads, section, scale,
    H: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of work tiles, 128 keys of one kv head, until the work queue is empty."""
    GROUP: tl.constexpr = H // G
    dtype: tl.constexpr = q_in.dtype
    # two buffers per warpgroup
    k = gl.allocate_shared_memory(dtype, [4, ROWS, BK], k_in.layout)
    v = gl.allocate_shared_memory(dtype, [4, ROWS, BK], v_in.layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, BT, BK], q_in.layout)
    if r_in is None:
        do = gl.allocate_shared_memory(dtype, [STAGES, BT, BK], do_in.layout)
        streamed = (q, do)
        streamed_in = (q_in, do_in)
    else:
        r = gl.allocate_shared_memory(dtype, [STAGES, BT, BK], r_in.layout)
        do = gl.allocate_shared_memory(dtype, [STAGES, BT, BK], do_in.layout)
        streamed = (q, r, do)
        streamed_in = (q_in, r_in, do_in)
    COUNT: tl.constexpr = 2 if r_in is None else 4
    constants = gl.allocate_shared_memory(tl.float32, [STAGES * COUNT, BT], rows_in.layout)
    kv_full = new_barriers(2, 1)
    kv_empty = new_barriers(2, 2)
    full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    tile_slots = new_tile_slots()
    fence_async_shared()
    buffers = (k, v, streamed, constants, kv_full, kv_empty, full, empty)
    schedule = (num_work_tiles, num_heads, section)
    inputs = (counter, streamed_in, k_in, v_in, rows_in)
    outputs = (dk_out, dv_out)
    mask = (end, T, window_size)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    buffers,
                    tile_slots,
                    schedule,
                    outputs,
                    mask,
                    scale,
                    G,
                    GROUP,
                    PACKED,
                    WINDOW,
                    IN_REGISTERS,
                ),
            ),
            (
                _consume,
                (
                    1,
                    buffers,
                    tile_slots,
                    schedule,
                    outputs,
                    mask,
                    scale,
                    G,
                    GROUP,
                    PACKED,
                    WINDOW,
                    IN_REGISTERS,
                ),
            ),
            (_produce, (buffers, tile_slots, schedule, mask, inputs, T_padded, G, GROUP, PACKED, WINDOW)),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def key_gradients(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    rows: Tensor,
    mask: Mask,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Compute dK and dV: launch the warp-specialized second pass.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16, K at most 128; with all others such that `can_use_descriptors`
            holds.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        do: Gradient of the output `[B, T, H, K]`.
        rows: Row constants `[B * H, 4, T rounded up to 64]` fp32 (without r 2) from
            `backward.query_gradients`.
        mask: Which keys queries see.
        scale: Factor of q.k.
        tile: Its block_t is the queries in a tile, its num_stages the stages of the ring buffer, its
            in_registers the operands that stay in registers: keys, keys and values, or none; it has 128 keys.

    Returns:
        dk, dv `[B, T, G, K]`.
    """
    batch_size, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    assert tile.block_s == 2 * ROWS.value, "the kernel has no other tile"
    assert rows.shape[2] % tile.block_t == 0, "a tile of row constants would read those of the next head"
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    block_k = triton.next_power_of_2(head_dim)
    q_in, do_in = (describe(x, tile.block_t, block_k) for x in (q, do))
    r_in = None if r is None else describe(r, tile.block_t, block_k)
    k_in, v_in, dk_out, dv_out = (describe(x, ROWS.value, block_k) for x in (k, v, dk, dv))
    rows_in = TensorDescriptor(rows, [rows.numel()], [1], [tile.block_t], _CONSTANTS)
    num_work_tiles = triton.cdiv(num_tokens, 2 * ROWS.value) * batch_size * num_kv_heads
    streamed = (
        (2 if r is None else 3)
        * num_heads
        // num_kv_heads
        * mask.reach(num_tokens)
        * head_dim
        * q.element_size()
    )
    num_programs, counter = make_work_queue(num_work_tiles, q.device)
    _parallax_bwd_dkdv_hopper_kernel[(num_programs,)](
        q_in, r_in, k_in, v_in, do_in, rows_in, dk_out, dv_out, mask.end, counter,
        num_tokens, rows.shape[2], mask.window_size or 0, num_work_tiles, batch_size * num_kv_heads,
        heads_per_section(batch_size * num_kv_heads, 1, streamed), scale,
        H=num_heads, G=num_kv_heads, BK=block_k, BT=tile.block_t, STAGES=tile.num_stages,
        PACKED=mask.is_packed, WINDOW=mask.has_window, IN_REGISTERS=tile.in_registers, num_warps=4,
    )  # fmt: skip
    return dk, dv
