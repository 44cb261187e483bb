"""What the Hopper kernels share whose programs own queries: forward, dQ and dR.

A program owns 128 query rows of one head at a time, 64 a warpgroup, and goes on to others: while it ends with
some, the operands of the next are copied. One warp copies tiles of keys and values, from the last row's key
backwards; both warpgroups read every tile, so that it is copied half as often as by programs of 64 rows.

Shared memory holds one or two sets of the operands of queries for each warpgroup, with a barrier that is
`q_full` when they have arrived, and one that is `q_empty` when their warpgroup has let them go. The ring,
`keys`, is (k, v, k_full, v_full, empty), or, where keys and values are let go at different times, with
`k_empty` and `v_empty` instead of `empty`.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from parallax.kernels.addressing import first_key, program_of
from parallax.kernels.hopper import ROWS, announce_item


@gluon.jit
def place_queries(
    i_item, order, mask, BS: tl.constexpr, H: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr
):
    """Return batch, head and first row of an item, and the number of its key tiles."""
    _, num_heads, section = order
    first, T, window_size = mask
    num_tiles = tl.cdiv(T, 2 * ROWS)
    i_rank, i_bh = program_of(i_item, num_tiles, num_heads, section)
    i_t = (num_tiles - 1 - i_rank) * 2 * ROWS
    i_first = i_t * 0
    if PACKED or WINDOW:
        i_first = tl.maximum(first_key(first, i_t, T, window_size, PACKED, WINDOW), 0) // BS * BS
    return i_bh // H, i_bh % H, i_t, (i_t + 2 * ROWS - i_first) // BS


@gluon.jit
def row_bounds(mask, o_t, i_t, i_w, num_steps, BS: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr):
    """Return what a warpgroup's rows o_t, from i_w on, see.

    The first key of each row; how many of the item's key tiles any of them sees, at least those of their own
    keys; the key before which some of them see none.
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
    """Return which keys of the tile at i_s the rows see, [ROWS, BS]."""
    o_s = gl.expand_dims(i_s + gl.arange(0, b_s.shape[1], gl.SliceLayout(0, b_s.type.layout)), 0)
    m_s = o_s <= gl.expand_dims(o_t, 1)
    if BOUNDED:
        m_s = m_s & (o_s >= gl.expand_dims(b_first, 1))
    return m_s


@gluon.jit
def skip_tiles(keys, i_first, i_end):
    """Wait for tiles and let them go, so that arrivals of two uses of a stage never meet."""
    k_full = keys[2]
    v_full = keys[3]
    STAGES: tl.constexpr = k_full.shape[0]
    for i_y in range(i_first, i_end):
        mbarrier.wait(k_full.index(i_y % STAGES), (i_y // STAGES) & 1)
        mbarrier.wait(v_full.index(i_y % STAGES), (i_y // STAGES) & 1)
        for i_e in gl.static_range(4, len(keys)):
            mbarrier.arrive(keys[i_e].index(i_y % STAGES), count=1)


@gluon.jit
def copy_tiles(
    queries, keys, items, order, mask, inputs, counter, H: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Draw items; copy the operands of their queries, and the tiles of all keys that they see."""
    operands, q_full, q_empty = queries
    k, v, k_full, v_full = keys[:4]
    empty = keys[4]
    operands_in, k_in, v_in = inputs
    STAGES: tl.constexpr = k.shape[0]
    SETS: tl.constexpr = operands[0].shape[0] // 2
    BS: tl.constexpr = k.shape[1]
    BK: tl.constexpr = k.shape[2]
    num_items, _, _ = order
    i_n = 0  # items so far
    i_x = 0  # tiles so far
    i_item = gl.atomic_add(counter, 1)
    announce_item(items, i_n, i_item)
    while i_item < num_items:
        i_b, i_h, i_t, num_steps = place_queries(i_item, order, mask, BS, H, PACKED, WINDOW)
        i_g = i_h // GROUP
        for i_y in range(i_x, i_x + num_steps):
            i_stage = i_y % STAGES
            i_s = i_t + 2 * ROWS - (i_y - i_x + 1) * BS
            mbarrier.wait(empty.index(i_stage), (i_y // STAGES & 1) ^ 1)
            mbarrier.expect(k_full.index(i_stage), BS * BK * 2)
            tma.async_copy_global_to_shared(k_in, [i_b, i_g, i_s, 0], k_full.index(i_stage), k.index(i_stage))
            if i_y == i_x:
                # the second warpgroup's first: it starts at once
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
        i_item = gl.atomic_add(counter, 1)
        announce_item(items, i_n, i_item)
