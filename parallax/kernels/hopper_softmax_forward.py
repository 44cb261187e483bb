"""Warp-specialized Hopper forward of softmax attention, (1) and (3) of `parallax.reference`, in Gluon.

Producer and consumers are those of `parallax.kernels.hopper_queries`, the lazily updated maxima those of
`parallax.kernels.hopper_forward`. Without probes there are enough registers to pipeline the two products: a
consumer computes the weights of a tile while the tensor cores multiply those of the previous tile by values.
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

from parallax.kernels.addressing import LN2, LOG2E, Mask, heads_per_section
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
from parallax.kernels.hopper_forward import MAX_LOG2_WEIGHT, _bound_scores, _rescale
from parallax.kernels.hopper_queries import is_visible, locate_queries, produce_tiles, row_bounds, skip_tiles
from parallax.kernels.key_norms import largest_key_norms
from parallax.kernels.row_sums import PTX_COLUMNS, round_tile
from parallax.kernels.tiles import Tile


@gluon.jit
def _weigh(b_s, b_m, scale_log2, dtype: tl.constexpr):
    """Return a tile's rounded weights, and their row sums in four columns.

    The sums are of the weights before rounding: the resulting error of o is small compared with the rounding
    of o itself. (With probes, which amplify weights, it would not be.)
    """
    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_m, 1))
    # a thread holds two adjacent columns of every eight of a product
    b_sum = gl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // 8, 4, 2])
    return round_tile(b_p, dtype, PTX_COLUMNS), gl.sum(gl.sum(b_sum, 3), 1)


@gluon.jit
def _attend_diagonal_tile(q, keys, i_y, i_s, o_t, b_first, b_zero, scale_log2, BOUNDED: tl.constexpr):
    """Return maxima, weights and row sums of the diagonal tile, a row's first."""
    k, _, k_full, _, k_empty, _ = keys
    STAGES: tl.constexpr = k.shape[0]
    mbarrier.wait(k_full.index(i_y % STAGES), (i_y // STAGES) & 1)
    b_s = warpgroup_mma(q, k.index(i_y % STAGES).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    m_s = is_visible(b_zero, i_s, o_t, b_first, BOUNDED)
    b_s = gl.where(m_s, warpgroup_mma_wait(0, deps=(b_s,)), float("-inf"))
    mbarrier.arrive(k_empty.index(i_y % STAGES), count=1)
    b_m = gl.max(b_s, 1) * scale_log2
    b_p, b_d = _weigh(b_s, b_m, scale_log2, k.dtype)
    return b_m, b_p, b_d


@gluon.jit
def _attend_tile(
    q, keys, i_y, i_s, o_t, b_first, is_masked, state, b_zero, scale_log2, UPDATE_MAX: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Compute the weights of one key tile while those of the previous tile are multiplied by its values.

    With UPDATE_MAX the rows' maxima may change.
    """
    b_m, a_p, b_o, b_d = state
    k, v, k_full, v_full, k_empty, v_empty = keys
    STAGES: tl.constexpr = k.shape[0]
    SUM: tl.constexpr = gl.SliceLayout(1, b_d.type.layout)
    RESCALE_THRESHOLD: tl.constexpr = 8.0 if k.dtype == tl.bfloat16 else 0.0
    i_stage = i_y % STAGES
    i_previous = (i_y - 1) % STAGES
    mbarrier.wait(k_full.index(i_stage), (i_y // STAGES) & 1)
    # [ROWS, BS]
    b_s = warpgroup_mma(q, k.index(i_stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(i_previous), ((i_y - 1) // STAGES) & 1)
    # [ROWS, BK]
    b_o = warpgroup_mma(a_p, v.index(i_previous), b_o, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    mbarrier.arrive(k_empty.index(i_stage), count=1)
    if BOUNDED:  # noqa: SIM102 (compiled away)
        if is_masked:
            b_s = gl.where(is_visible(b_zero, i_s, o_t, b_first, True), b_s, float("-inf"))
    b_m_new = b_m
    if UPDATE_MAX:
        b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * scale_log2)
        b_m_new = gl.where(b_m_new - b_m > RESCALE_THRESHOLD, b_m_new, b_m)
        b_alpha = gl.exp2(b_m - b_m_new)
        b_d *= gl.expand_dims(gl.convert_layout(b_alpha, SUM), 1)
    b_p, b_sum = _weigh(b_s, b_m_new, scale_log2, k.dtype)
    b_d += b_sum
    b_o = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(v_empty.index(i_previous), count=1)
    if UPDATE_MAX:
        b_o = _rescale(b_o, b_alpha)
    return b_m_new, gl.convert_layout(b_p, gl.DotOperandLayout(0, b_o.type.layout, 2)), b_o, b_d


@gluon.jit
def _consume(
    WARPGROUP: tl.constexpr, queries, keys, rest, H: tl.constexpr, G: tl.constexpr, PACKED: tl.constexpr,
    WINDOW: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Compute and store the output rows of a consumer warpgroup."""
    BOUNDED: tl.constexpr = PACKED or WINDOW
    operands, q_full, q_empty = queries
    k, v, _, v_full, _, v_empty = keys
    tile_slots, schedule, outputs, mask, scale, key_norms = rest
    o_out, lse = outputs
    _, T, _ = mask
    STAGES: tl.constexpr = k.shape[0]
    BS: tl.constexpr = k.shape[1]
    BK: tl.constexpr = k.shape[2]
    # key tiles run backwards from the last row: of 64 keys, the first warpgroup's diagonal tile is the second
    NUM_SKIPPED: tl.constexpr = (1 - WARPGROUP) * ROWS // BS
    gl.static_assert(BS == ROWS or BS == 2 * ROWS)
    gl.static_assert(STAGES >= 2, "the values of the previous tile are still in use")
    SCORES: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    ACC: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    ROW: tl.constexpr = gl.SliceLayout(1, ACC)
    b_zero = gl.zeros([ROWS, BS], tl.float32, SCORES)
    scale_log2 = scale * LOG2E
    num_work_tiles, _, _ = schedule
    i_n = 0  # work tiles so far
    i_x = 0  # tiles of keys so far
    i_work_tile = receive_work_tile(tile_slots, i_n)
    while i_work_tile < num_work_tiles:
        i_b, i_h, i_t, num_steps = locate_queries(i_work_tile, schedule, mask, BS, H, PACKED, WINDOW)
        i_buffer = i_n % 2 * 2 + WARPGROUP
        q = operands[0].index(i_buffer)
        i_w = i_t + WARPGROUP * ROWS
        o_t = i_w + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        b_first, i_last, i_hidden = row_bounds(mask, o_t, i_t, i_w, num_steps, BS, PACKED, WINDOW)

        skip_tiles(keys, i_x, i_x + NUM_SKIPPED)
        i_diagonal = i_x + NUM_SKIPPED
        mbarrier.wait(q_full.index(i_buffer), (i_n // 2) & 1)
        b_bound = gl.zeros([ROWS], tl.float32, gl.SliceLayout(1, SCORES))
        if NORMS:
            b_bound = _bound_scores(q, gl.load(key_norms + i_b * G + i_h // (H // G)), scale_log2, b_bound)
        i_s = i_t + 2 * ROWS - (NUM_SKIPPED + 1) * BS
        b_m, b_p, b_d = _attend_diagonal_tile(
            q, keys, i_diagonal, i_s, o_t, b_first, b_zero, scale_log2, BOUNDED
        )
        b_o = gl.zeros([ROWS, BK], tl.float32, ACC)
        state = (b_m, gl.convert_layout(b_p, gl.DotOperandLayout(0, ACC, 2)), b_o, b_d)
        # the rows of the previous work tile are stored by now
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(i_buffer ^ 2), count=1, pred=i_n > 0)
        # all other tiles run in one of two loops
        i_end = tl.maximum(i_x + i_last, i_diagonal + 1)
        i_update = i_diagonal + 1
        if NORMS:
            i_update = tl.where(gl.max(b_bound - b_m, 0) < MAX_LOG2_WEIGHT, i_end, i_update)
        zones = (i_diagonal + 1, i_update, i_end)
        for UPDATE_MAX in gl.static_range(0 if NORMS else 1, 2):
            for i_y in range(zones[UPDATE_MAX], zones[UPDATE_MAX + 1]):
                i_s = i_t + 2 * ROWS - (i_y - i_x + 1) * BS
                state = _attend_tile(
                    q,
                    keys,
                    i_y,
                    i_s,
                    o_t,
                    b_first,
                    i_s < i_hidden,
                    state,
                    b_zero,
                    scale_log2,
                    UPDATE_MAX,
                    BOUNDED,
                )
        b_m, a_p, b_o, b_d = state
        i_previous = (i_end - 1) % STAGES
        mbarrier.wait(v_full.index(i_previous), ((i_end - 1) // STAGES) & 1)
        b_o = warpgroup_mma(a_p, v.index(i_previous), b_o, is_async=True)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_empty.index(i_previous), count=1)
        # tiles that only the other warpgroup sees
        skip_tiles(keys, i_end, i_x + num_steps)
        i_x += num_steps

        b_sum = gl.maximum(gl.convert_layout(gl.sum(b_d, 1), ROW), 0.5)
        # [ROWS, BK], staged in the buffer of the warpgroup's queries
        q.store((b_o * gl.expand_dims(1.0 / b_sum, 1)).to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_out, [i_b, i_h, i_w, 0], q)
        o_t = i_w + gl.arange(0, ROWS, ROW)
        p_t = tl.cast(i_b * H + i_h, tl.int64) * T + o_t
        gl.store(lse + p_t, (gl.convert_layout(b_m, ROW) + gl.log2(b_sum)) * LN2, mask=o_t < T)
        i_n += 1
        i_work_tile = receive_work_tile(tile_slots, i_n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "window_size", "num_work_tiles", "num_heads", "section"])
def _softmax_fwd_hopper_kernel(
    q_in, k_in, v_in, o_out, lse, first, key_norms, counter,
    T, window_size, num_work_tiles, num_heads, section, scale,
    H: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Compute the output of work tiles, 128 rows of one head, until the work queue is empty."""
    dtype: tl.constexpr = q_in.dtype
    # two buffers per warpgroup
    q = gl.allocate_shared_memory(dtype, [4, ROWS, BK], q_in.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, BS, BK], k_in.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, BS, BK], v_in.layout)
    q_full = new_barriers(4, 1)
    q_empty = new_barriers(4, 1)
    k_full = new_barriers(STAGES, 1)
    v_full = new_barriers(STAGES, 1)
    k_empty = new_barriers(STAGES, 2)
    v_empty = new_barriers(STAGES, 2)
    tile_slots = new_tile_slots()
    fence_async_shared()
    queries = ((q,), q_full, q_empty)
    keys = (k, v, k_full, v_full, k_empty, v_empty)
    schedule = (num_work_tiles, num_heads, section)
    inputs = ((q_in,), k_in, v_in)
    outputs = (o_out, lse)
    mask = (first, T, window_size)
    rest = (tile_slots, schedule, outputs, mask, scale, key_norms)
    gl.warp_specialize(
        [
            (_consume, (0, queries, keys, rest, H, G, PACKED, WINDOW, NORMS)),
            (_consume, (1, queries, keys, rest, H, G, PACKED, WINDOW, NORMS)),
            (
                produce_tiles,
                (queries, keys, tile_slots, schedule, mask, inputs, counter, H, H // G, PACKED, WINDOW),
            ),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, o: Tensor, *, tile: Tile) -> Tensor:
    """Compute softmax attention: launch the warp-specialized forward kernel.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16, K at most 128; all three such that `can_use_descriptors` holds.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        mask: Which keys queries see.
        scale: Factor of q.k, positive.
        o: Where to write the output `[B, T, H, K]`, contiguous.
        tile: Its block_s is the keys in a tile, 64 or 128, its num_stages the stages of the ring buffer; it
            has 128 rows. Its key_norms is for bf16 alone.

    Returns:
        lse `[B, H, T]` fp32.
    """
    assert (tile.block_t, tile.sums) == (2 * ROWS.value, PTX_COLUMNS.value), "the kernel has no other tile"
    batch_size, num_tokens, num_heads, head_dim = q.shape
    lse = torch.empty(batch_size, num_heads, num_tokens, dtype=torch.float32, device=q.device)
    block_k = triton.next_power_of_2(head_dim)
    q_in, o_out = (describe(x, ROWS.value, block_k) for x in (q, o))
    k_in, v_in = (describe(x, tile.block_s, block_k) for x in (k, v))
    num_work_tiles = triton.cdiv(num_tokens, 2 * ROWS.value) * batch_size * num_heads
    streamed = 2 * mask.reach(num_tokens) * head_dim * k.element_size()
    section = heads_per_section(batch_size * num_heads, num_heads // k.shape[2], streamed)
    num_programs, counter = make_work_queue(num_work_tiles, q.device)
    # fp16 weights must not grow
    key_norms = largest_key_norms(k) if tile.key_norms and q.dtype == torch.bfloat16 else None
    _softmax_fwd_hopper_kernel[(num_programs,)](
        q_in, k_in, v_in, o_out, lse, mask.first, key_norms, counter,
        num_tokens, mask.window_size or 0, num_work_tiles, batch_size * num_heads, section, scale,
        H=num_heads, G=k.shape[2], BK=block_k, BS=tile.block_s, STAGES=tile.num_stages,
        PACKED=mask.is_packed, WINDOW=mask.has_window, NORMS=key_norms is not None, num_warps=4,
    )  # fmt: skip
    return lse
