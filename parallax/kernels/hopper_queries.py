"""Producer warp and row bounds of the Hopper kernels that tile queries: forward, dQ and dR.

A work tile is 128 query rows of one head, 64 per consumer warpgroup. While its epilogue runs, the operands of
the next one are copied. The producer copies tiles of keys and values from the diagonal backwards, to earlier
keys; both consumers read every tile, which halves the copies compared with programs of 64 rows.

Shared memory holds one or two sets of query operands per consumer, with barriers `q_full` (the operands have
arrived) and `q_empty` (the consumer has released them). The ring buffer `keys` is (k, v, k_full, v_full,
empty), or, where keys and values are released at different times, has `k_empty` and `v_empty` for `empty`.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from parallax.kernels.addressing import first_key, program_of
from parallax.kernels.hopper import ROWS, publish_work_tile


@gluon.jit
def locate_queries(
    i_work_tile, schedule, mask, BS: tl.constexpr, H: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr
):
    """Return batch, head, first row and number of key tiles of a work tile."""
    _, num_heads, section = schedule
    first, T, window_size = mask
    num_tiles = tl.cdiv(T, 2 * ROWS)
    i_rank, i_bh = program_of(i_work_tile, num_tiles, num_heads, section)
    i_t = (num_tiles - 1 - i_rank) * 2 * ROWS
    i_first = i_t * 0
    if PACKED or WINDOW:
        i_first = tl.maximum(first_key(first, i_t, T, window_size, PACKED, WINDOW), 0) // BS * BS
    return i_bh // H, i_bh % H, i_t, (i_t + 2 * ROWS - i_first) // BS


@gluon.jit
def row_bounds(mask, o_t, i_t, i_w, num_steps, BS: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr):
    """Return the key bounds of a warpgroup's rows o_t, which start at i_w.

    They are the first visible key of each row; the number of the work tile's key tiles up to the last one
    that any row sees, at least those on the diagonal; and the last row's first key, before which some rows
    are masked.
    """
    first, T, window_size = mask
    b_first = o_t
    i_last = num_steps
    i_hidden = i_w * 0
    if PACKED or WINDOW:
        b_first = first_key(first, o_t, T, window_size, PACKED, WINDOW)
        i_row = tl.minimum(i_w, T - 1)
        i_lowest = tl.maximum(first_key(first, i_row, T, window_size, PACKED, WINDOW), 0)
        i_last = tl.minimum(num_steps, (i_t + 2 * ROWS - i_lowest + BS - 1) // BS)
        i_hidden = first_key(first, tl.minimum(i_w + ROWS, T) - 1, T, window_size, PACKED, WINDOW)
    return b_first, i_last, i_hidden


@gluon.jit
def is_visible(b_s, i_s, o_t, b_first, BOUNDED: tl.constexpr):
    """Return the mask of the keys visible to each row in the tile at i_s, [ROWS, BS]."""
    o_s = gl.expand_dims(i_s + gl.arange(0, b_s.shape[1], gl.SliceLayout(0, b_s.type.layout)), 0)
    m_s = o_s <= gl.expand_dims(o_t, 1)
    if BOUNDED:
        m_s = m_s & (o_s >= gl.expand_dims(b_first, 1))
    return m_s


@gluon.jit
def skip_tiles(keys, i_first, i_end):
    """Wait for tiles and release them unread, so that arrivals of two uses of a stage never mix."""
    k_full = keys[2]
    v_full = keys[3]
    STAGES: tl.constexpr = k_full.shape[0]
    for i_y in range(i_first, i_end):
        mbarrier.wait(k_full.index(i_y % STAGES), (i_y // STAGES) & 1)
        mbarrier.wait(v_full.index(i_y % STAGES), (i_y // STAGES) & 1)
        for i_e in gl.static_range(4, len(keys)):
            mbarrier.arrive(keys[i_e].index(i_y % STAGES), count=1)


@gluon.jit
def produce_tiles(
    queries, keys, tile_slots, schedule, mask, inputs, counter, H: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Fetch work tiles; copy their query operands and all key and value tiles that they see."""
    operands, q_full, q_empty = queries
    k, v, k_full, v_full = keys[:4]
    empty = keys[4]
    operands_in, k_in, v_in = inputs
    STAGES: tl.constexpr = k.shape[0]
    SETS: tl.constexpr = operands[0].shape[0] // 2
    BS: tl.constexpr = k.shape[1]
    BK: tl.constexpr = k.shape[2]
    num_work_tiles, _, _ = schedule
    i_n = 0  # work tiles so far
    i_x = 0  # key tiles so far
    i_work_tile = gl.atomic_add(counter, 1)
    publish_work_tile(tile_slots, i_n, i_work_tile)
    while i_work_tile < num_work_tiles:
        i_b, i_h, i_t, num_steps = locate_queries(i_work_tile, schedule, mask, BS, H, PACKED, WINDOW)
        i_g = i_h // GROUP
        for i_y in range(i_x, i_x + num_steps):
            i_stage = i_y % STAGES
            i_s = i_t + 2 * ROWS - (i_y - i_x + 1) * BS
            mbarrier.wait(empty.index(i_stage), (i_y // STAGES & 1) ^ 1)
            mbarrier.expect(k_full.index(i_stage), BS * BK * 2)
            tma.async_copy_global_to_shared(k_in, [i_b, i_g, i_s, 0], k_full.index(i_stage), k.index(i_stage))
            if i_y == i_x:
                # the second warpgroup's operands first: it skips no tile
                for i_w in gl.static_range(1, -1, -1):
                    i_buffer = i_n % SETS * 2 + i_w
                    bar = q_full.index(i_buffer)
                    place = [i_b, i_h, i_t + i_w * ROWS, 0]
                    mbarrier.wait(q_empty.index(i_buffer), (i_n // SETS & 1) ^ 1)
                    mbarrier.expect(bar, len(operands) * ROWS * BK * 2)
                    for i_o in gl.static_range(len(operands)):
                        tma.async_copy_global_to_shared(
                            operands_in[i_o], place, bar, operands[i_o].index(i_buffer)
                        )
            if len(keys) == 6:
                mbarrier.wait(keys[5].index(i_stage), (i_y // STAGES & 1) ^ 1)
            mbarrier.expect(v_full.index(i_stage), BS * BK * 2)
            tma.async_copy_global_to_shared(v_in, [i_b, i_g, i_s, 0], v_full.index(i_stage), v.index(i_stage))
        i_x += num_steps
        i_n += 1
        i_work_tile = gl.atomic_add(counter, 1)
        publish_work_tile(tile_slots, i_n, i_work_tile)
