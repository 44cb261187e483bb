"""Warp-specialized Hopper forward of Parallax, (1) to (6) and (12) of `parallax.reference`, in Gluon.

It computes what `parallax.kernels.forward` does; producer and consumers are those of
`parallax.kernels.hopper_queries`. A row starts with its diagonal tile, which gives its centre c of (12).

Overlap. Within a tile the maximum and P1 are computed during the product of T, P2 during P1 V, and the row
sums during P2 V. A tile takes about the time of its products plus one clock per instruction of a warp.

Lazy rescaling. The running maximum m may be any number near the row's maximum, so it is updated only where
weights would exceed 2^8 (1 in fp16, which overflows at 2^16), and a warp skips the rescaling of its sums
where no maximum changed. For long rows in bf16 the norms of queries and keys bound how far scores can exceed
the maximum of the first tile; where weights stay below 2^MAX_LOG2_WEIGHT, later tiles compute no maximum.
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
from parallax.kernels.hopper_queries import is_visible, locate_queries, produce_tiles, row_bounds, skip_tiles
from parallax.kernels.key_norms import largest_key_norms
from parallax.kernels.row_sums import PTX_COLUMNS, ptx_row_sums, round_tile
from parallax.kernels.tiles import Tile

MAX_LOG2_WEIGHT = tl.constexpr(64.0)
"""Largest log2 of a weight, at most 0 in the first tile; sums of 2^63 such weights stay in range."""


def _rescale_ptx(n: int) -> tuple[tl.constexpr, tl.constexpr]:
    """Return PTX, and its operands, that multiplies a thread's n sums by the factors of its two rows.

    Skips the multiplications where all factors of the warp are one.
    """
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    ptx = (
        "{.reg .pred p, q; "
        f"setp.eq.f32 p, ${2 * n}, 0f3F800000; setp.eq.and.f32 p, ${2 * n + 2}, 0f3F800000, p; "
        "vote.sync.all.pred q, p, 0xffffffff; @q bra unmoved; " + products + " unmoved: }"
    )
    operands = ["=f"] * n + [str(i) for i in range(n)] + ["f"] * n
    return tl.constexpr(ptx), tl.constexpr(",".join(operands))


_PTX_64, _OPERANDS_64 = _rescale_ptx(32)
_PTX_128, _OPERANDS_128 = _rescale_ptx(64)


@gluon.jit
def _rescale(b_o, b_alpha):
    """Return o [ROWS, BK] times alpha [ROWS]."""
    b_factor = gl.expand_dims(gl.convert_layout(b_alpha, gl.SliceLayout(1, b_o.type.layout)), 1)
    if b_o.shape[1] == 64:
        b_o = gl.inline_asm_elementwise(
            _PTX_64, _OPERANDS_64, [b_o, b_factor], dtype=tl.float32, is_pure=True, pack=32
        )
    else:
        b_o = gl.inline_asm_elementwise(
            _PTX_128, _OPERANDS_128, [b_o, b_factor], dtype=tl.float32, is_pure=True, pack=64
        )
    return b_o


@gluon.jit
def _bound_scores(q, key_norm, scale_log2, b_row):
    """Return upper bounds on the base-2 scores of q [ROWS, BK] in shared memory, in the layout of b_row."""
    BK: tl.constexpr = q.shape[1]
    b_q = q.load(gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])).to(tl.float32)
    b_norm = gl.convert_layout(gl.sum(b_q * b_q, 1), b_row.type.layout)
    return gl.sqrt(b_norm) * gl.sqrt(key_norm) * scale_log2


@gluon.jit
def _attend_diagonal_tile(
    q, r, k, v, v_full, i_phase, i_s, o_t, b_first, b_zero, scale_log2, BOUNDED: tl.constexpr
):
    """Return the maxima, the centre c of (12) and the sums of (6) over the diagonal tile, a row's first."""
    BK: tl.constexpr = q.shape[1]
    ACC: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    LEFT: tl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    # [ROWS, BS]
    b_s = warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_t = warpgroup_mma(r, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    m_s = is_visible(b_zero, i_s, o_t, b_first, BOUNDED)
    b_s = gl.where(m_s, warpgroup_mma_wait(1, deps=(b_s,)), float("-inf"))
    b_m = gl.max(b_s, 1) * scale_log2
    b_p1 = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_m, 1))
    b_t = gl.where(m_s, warpgroup_mma_wait(0, deps=(b_t,)), 0.0)
    # the largest weight gives the sum at least one half
    b_c = gl.sum(b_p1 * b_t, 1) / gl.maximum(gl.sum(b_p1, 1), 0.5)
    b_p2 = round_tile(b_p1 * (b_t - gl.expand_dims(b_c, 1)), v.dtype, PTX_COLUMNS)
    b_p1 = round_tile(b_p1, v.dtype, PTX_COLUMNS)
    mbarrier.wait(v_full, i_phase)
    # [ROWS, BK]
    b_o = gl.zeros([ROWS, BK], tl.float32, ACC)
    b_o1 = warpgroup_mma(gl.convert_layout(b_p1, LEFT), v, b_o, use_acc=False, is_async=True)
    b_o2 = warpgroup_mma(gl.convert_layout(b_p2, LEFT), v, b_o, use_acc=False, is_async=True)
    b_d1 = ptx_row_sums(b_p1)
    b_d2 = ptx_row_sums(b_p2)
    b_o1, b_o2 = warpgroup_mma_wait(0, deps=(b_o1, b_o2))
    return b_m, b_c, b_o1, b_d1, b_o2, b_d2


@gluon.jit
def _attend_tile(
    q, r, k, v, v_full, i_phase, i_s, o_t, b_first, is_masked, b_m, b_c, b_o1, b_d1, b_o2, b_d2, b_zero,
    scale_log2, UPDATE_MAX: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the sums of (6); with UPDATE_MAX the rows' maxima may change."""
    LEFT: tl.constexpr = gl.DotOperandLayout(0, b_o1.type.layout, 2)
    SUM: tl.constexpr = gl.SliceLayout(1, b_d1.type.layout)
    RESCALE_THRESHOLD: tl.constexpr = 8.0 if v.dtype == tl.bfloat16 else 0.0
    # [ROWS, BS]
    b_s = warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_t = warpgroup_mma(r, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    if BOUNDED:  # noqa: SIM102 (compiled away)
        if is_masked:
            b_s = gl.where(is_visible(b_zero, i_s, o_t, b_first, True), b_s, float("-inf"))
    b_m_new = b_m
    if UPDATE_MAX:
        b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * scale_log2)
        b_m_new = gl.where(b_m_new - b_m > RESCALE_THRESHOLD, b_m_new, b_m)
    b_alpha = gl.exp2(b_m - b_m_new)
    b_p1 = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_m_new, 1))
    b_p1_low = round_tile(b_p1, v.dtype, PTX_COLUMNS)
    if UPDATE_MAX:
        b_o1 = _rescale(b_o1, b_alpha)
    mbarrier.wait(v_full, i_phase)
    # [ROWS, BK]
    b_o1 = warpgroup_mma(gl.convert_layout(b_p1_low, LEFT), v, b_o1, is_async=True)
    if UPDATE_MAX:
        b_o2 = _rescale(b_o2, b_alpha)
    b_t = warpgroup_mma_wait(1, deps=(b_t,))
    # P1 is zero where a key is masked
    b_p2 = round_tile(b_p1 * (b_t - gl.expand_dims(b_c, 1)), v.dtype, PTX_COLUMNS)
    b_o2 = warpgroup_mma(gl.convert_layout(b_p2, LEFT), v, b_o2, is_async=True)
    if UPDATE_MAX:
        b_alpha = gl.expand_dims(gl.convert_layout(b_alpha, SUM), 1)
        b_d1 *= b_alpha
        b_d2 *= b_alpha
    b_d1 += ptx_row_sums(b_p1_low)
    b_d2 += ptx_row_sums(b_p2)
    b_o1, b_o2 = warpgroup_mma_wait(0, deps=(b_o1, b_o2))
    return b_m_new, b_o1, b_d1, b_o2, b_d2


@gluon.jit
def _consume(
    WARPGROUP: tl.constexpr, queries, keys, rest, H: tl.constexpr, G: tl.constexpr, PACKED: tl.constexpr,
    WINDOW: tl.constexpr, NORMS: tl.constexpr, SAVE_VBAR: tl.constexpr,
):  # fmt: skip
    """Compute and store the output rows of a consumer warpgroup."""
    BOUNDED: tl.constexpr = PACKED or WINDOW
    operands, q_full, q_empty = queries
    q_buffers, r_buffers = operands
    k, v, k_full, v_full, empty = keys
    tile_slots, schedule, outputs, mask, scale, key_norms = rest
    o_out, vbar_out, lse, tbar = outputs
    _, T, _ = mask
    STAGES: tl.constexpr = k.shape[0]
    BS: tl.constexpr = k.shape[1]
    # key tiles run backwards from the last row: of 64 keys, the first warpgroup's diagonal tile is the second
    NUM_SKIPPED: tl.constexpr = (1 - WARPGROUP) * ROWS // BS
    gl.static_assert(BS == ROWS or BS == 2 * ROWS)
    gl.static_assert(STAGES >= 2, "the first two tiles have stages of their own")
    SCORES: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    b_zero = gl.zeros([ROWS, BS], tl.float32, SCORES)
    scale_log2 = scale * LOG2E
    num_work_tiles, _, _ = schedule
    i_n = 0  # work tiles so far
    i_x = 0  # tiles of keys so far
    i_work_tile = receive_work_tile(tile_slots, i_n)
    while i_work_tile < num_work_tiles:
        i_b, i_h, i_t, num_steps = locate_queries(i_work_tile, schedule, mask, BS, H, PACKED, WINDOW)
        i_buffer = i_n % 2 * 2 + WARPGROUP
        q = q_buffers.index(i_buffer)
        r = r_buffers.index(i_buffer)
        i_w = i_t + WARPGROUP * ROWS
        o_t = i_w + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        b_first, i_last, i_hidden = row_bounds(mask, o_t, i_t, i_w, num_steps, BS, PACKED, WINDOW)

        skip_tiles(keys, i_x, i_x + NUM_SKIPPED)
        i_diagonal = i_x + NUM_SKIPPED
        i_stage = i_diagonal % STAGES
        i_phase = (i_diagonal // STAGES) & 1
        mbarrier.wait(q_full.index(i_buffer), (i_n // 2) & 1)
        b_bound = gl.zeros([ROWS], tl.float32, gl.SliceLayout(1, SCORES))
        if NORMS:
            b_bound = _bound_scores(q, gl.load(key_norms + i_b * G + i_h // (H // G)), scale_log2, b_bound)
        mbarrier.wait(k_full.index(i_stage), i_phase)
        b_m, b_c, b_o1, b_d1, b_o2, b_d2 = _attend_diagonal_tile(
            q, r, k.index(i_stage), v.index(i_stage), v_full.index(i_stage), i_phase,
            i_t + 2 * ROWS - (NUM_SKIPPED + 1) * BS, o_t, b_first, b_zero, scale_log2, BOUNDED,
        )  # fmt: skip
        mbarrier.arrive(empty.index(i_stage), count=1)
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
                i_stage = i_y % STAGES
                i_phase = (i_y // STAGES) & 1
                i_s = i_t + 2 * ROWS - (i_y - i_x + 1) * BS
                mbarrier.wait(k_full.index(i_stage), i_phase)
                b_m, b_o1, b_d1, b_o2, b_d2 = _attend_tile(
                    q, r, k.index(i_stage), v.index(i_stage), v_full.index(i_stage), i_phase, i_s, o_t,
                    b_first, i_s < i_hidden, b_m, b_c, b_o1, b_d1, b_o2, b_d2, b_zero, scale_log2, UPDATE_MAX,
                    BOUNDED,
                )  # fmt: skip
                mbarrier.arrive(empty.index(i_stage), count=1)
        # tiles that only the other warpgroup sees
        skip_tiles(keys, i_end, i_x + num_steps)
        i_x += num_steps

        ROW: tl.constexpr = gl.SliceLayout(1, b_o1.type.layout)
        b_d1 = gl.maximum(gl.convert_layout(gl.sum(b_d1, 1), ROW), 0.5)
        b_inverse = 1.0 / b_d1
        b_shift = gl.convert_layout(gl.sum(b_d2, 1), ROW) * b_inverse
        # [ROWS, BK], staged in the buffers of the warpgroup's queries and probes
        b_o = (b_o1 * gl.expand_dims(1.0 + b_shift, 1) - b_o2) * gl.expand_dims(b_inverse, 1)
        q.store(b_o.to(q.dtype))
        if SAVE_VBAR:
            r.store((b_o1 * gl.expand_dims(b_inverse, 1)).to(r.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_out, [i_b, i_h, i_w, 0], q)
        if SAVE_VBAR:
            tma.async_copy_shared_to_global(vbar_out, [i_b, i_h, i_w, 0], r)
        o_t = i_w + gl.arange(0, ROWS, ROW)
        p_t = tl.cast(i_b * H + i_h, tl.int64) * T + o_t
        gl.store(lse + p_t, (gl.convert_layout(b_m, ROW) + gl.log2(b_d1)) * LN2, mask=o_t < T)
        gl.store(tbar + p_t, gl.convert_layout(b_c, ROW) + b_shift, mask=o_t < T)
        i_n += 1
        i_work_tile = receive_work_tile(tile_slots, i_n)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "window_size", "num_work_tiles", "num_heads", "section"])
def _parallax_fwd_hopper_kernel(
    q_in, r_in, k_in, v_in, o_out, vbar_out, lse, tbar, first, key_norms, counter,
    T, window_size, num_work_tiles, num_heads, section, scale,
    H: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, NORMS: tl.constexpr, SAVE_VBAR: tl.constexpr,
):  # fmt: skip
    """Compute the output of work tiles, 128 rows of one head, until the work queue is empty."""
    dtype: tl.constexpr = q_in.dtype
    # two buffers per warpgroup
    q = gl.allocate_shared_memory(dtype, [4, ROWS, BK], q_in.layout)
    r = gl.allocate_shared_memory(dtype, [4, ROWS, BK], r_in.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, BS, BK], k_in.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, BS, BK], v_in.layout)
    q_full = new_barriers(4, 1)
    q_empty = new_barriers(4, 1)
    k_full = new_barriers(STAGES, 1)
    v_full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    tile_slots = new_tile_slots()
    fence_async_shared()
    queries = ((q, r), q_full, q_empty)
    keys = (k, v, k_full, v_full, empty)
    schedule = (num_work_tiles, num_heads, section)
    inputs = ((q_in, r_in), k_in, v_in)
    outputs = (o_out, vbar_out, lse, tbar)
    mask = (first, T, window_size)
    rest = (tile_slots, schedule, outputs, mask, scale, key_norms)
    gl.warp_specialize(
        [
            (_consume, (0, queries, keys, rest, H, G, PACKED, WINDOW, NORMS, SAVE_VBAR)),
            (_consume, (1, queries, keys, rest, H, G, PACKED, WINDOW, NORMS, SAVE_VBAR)),
            (
                produce_tiles,
                (queries, keys, tile_slots, schedule, mask, inputs, counter, H, H // G, PACKED, WINDOW),
            ),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def forward(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    *,
    save_vbar: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Parallax attention: launch the warp-specialized forward kernel.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16, K at most 128; all four such that `can_use_descriptors` holds.
        r: Probes `[B, T, H, K]`.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        mask: Which keys queries see.
        scale: Factor of q.k, positive.
        save_vbar: Whether a backward follows.
        tile: Its block_s is the keys in a tile, 64 or 128, its num_stages the stages of the ring buffer; it
            has 128 rows. Its key_norms is for bf16 alone.

    Returns:
        As `parallax.kernels.forward.forward`.
    """
    assert (tile.block_t, tile.sums) == (2 * ROWS.value, PTX_COLUMNS.value), "the kernel has no other tile"
    batch_size, num_tokens, num_heads, head_dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    vbar = torch.empty(q.shape if save_vbar else (0,), dtype=q.dtype, device=q.device)
    lse = torch.empty(batch_size, num_heads, num_tokens, dtype=torch.float32, device=q.device)
    tbar = torch.empty_like(lse)
    block_k = triton.next_power_of_2(head_dim)
    q_in, r_in, o_out = (describe(x, ROWS.value, block_k) for x in (q, r, o))
    k_in, v_in = (describe(x, tile.block_s, block_k) for x in (k, v))
    vbar_out = describe(vbar, ROWS.value, block_k) if save_vbar else o_out
    num_work_tiles = triton.cdiv(num_tokens, 2 * ROWS.value) * batch_size * num_heads
    streamed = 2 * mask.reach(num_tokens) * head_dim * k.element_size()
    section = heads_per_section(batch_size * num_heads, num_heads // k.shape[2], streamed)
    num_programs, counter = make_work_queue(num_work_tiles, q.device)
    # fp16 weights must not grow
    key_norms = largest_key_norms(k) if tile.key_norms and q.dtype == torch.bfloat16 else None
    _parallax_fwd_hopper_kernel[(num_programs,)](
        q_in, r_in, k_in, v_in, o_out, vbar_out, lse, tbar, mask.first, key_norms, counter,
        num_tokens, mask.window_size or 0, num_work_tiles, batch_size * num_heads, section, scale,
        H=num_heads, G=k.shape[2], BK=block_k, BS=tile.block_s, STAGES=tile.num_stages,
        PACKED=mask.is_packed, WINDOW=mask.has_window, NORMS=key_norms is not None, SAVE_VBAR=save_vbar,
        num_warps=4,
    )  # fmt: skip
    return o, vbar, lse, tbar
