"""Decode kernels: a few new queries of each sequence over its cache.

(1) to (6) and (12) of `parallax.reference`. The cache is cut into splits along its tokens, so that a few
long sequences fill the device too. A program takes one split of one kv head: all query heads of the group and
all new tokens are the rows of one tile, so keys and values are read once. Rows are padded to sixteen for the
tensor cores, which costs nothing where memory is what limits.

A split s leaves its own vbar_s, C_s = Sigma_KV rho over its keys (the correction before its sign), the
log-sum-exp of its logits and tbar_s. With w_s = exp(lse_s - lse) the merge is the law of total covariance,

    tbar = sum_s w_s tbar_s,    o = sum_s w_s (vbar_s (1 + tbar - tbar_s) - C_s),

in fp32 by a second kernel. Launches hide under what ran before (programmatic dependent launch, Hopper on).

The splits divide the keys that a sequence has, not the cache's capacity: one CUDA graph serves all lengths.
Letters as in `parallax.kernels.addressing`; M rows: new tokens times heads of a group.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallax.kernels.addressing import LOG2E
from parallax.kernels.row_sums import add_row_sums

HEAD_DIMS = (64, 128)
"""Head widths that decoding serves."""

MAX_NEW_TOKENS = 8
"""New tokens of a sequence that one call takes."""

MAX_GROUP = 16
"""Query heads of a kv head."""

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of splits to choose from: with those that divide usual lengths no tile is nearly empty."""


@triton.jit
def _load_rows(
    x, strides, i_b, i_g, o_m, GROUP: tl.constexpr, K: tl.constexpr, M: tl.constexpr, FIRST: tl.constexpr
):
    """Load the queries or probes of a group into rows from FIRST on, [BM, K]; zeros elsewhere.

    Row FIRST + m is token m // GROUP, head m % GROUP.
    """
    o_k = tl.arange(0, K)
    o_x = o_m - FIRST
    i_x = tl.cast(i_b, tl.int64) * strides[0] + tl.cast(i_g, tl.int64) * GROUP * strides[2]
    p_x = x + i_x + (o_x // GROUP * strides[1] + o_x % GROUP * strides[2])[:, None] + o_k[None, :]
    return tl.load(p_x, mask=((o_x >= 0) & (o_x < M))[:, None], other=0.0)


@triton.jit
def _halves(b_x, STRIPS: tl.constexpr, N: tl.constexpr):
    """Return rows 0 to 7 and rows 8 to 15 of [(STRIPS,) 16, N]; a thread holds both of a pair in registers."""
    if STRIPS == 1:
        b_x = tl.permute(tl.reshape(b_x, [2, 8, N]), (1, 2, 0))
    else:
        b_x = tl.permute(tl.reshape(b_x, [STRIPS, 2, 8, N]), (0, 2, 3, 1))
    return tl.split(b_x)


@triton.jit
def _stack(b_x, b_y, STRIPS: tl.constexpr, N: tl.constexpr):
    """Undo _halves."""
    b_xy = tl.join(b_x, b_y)
    if STRIPS == 1:
        b_xy = tl.reshape(tl.permute(b_xy, (2, 0, 1)), [16, N])
    else:
        b_xy = tl.reshape(tl.permute(b_xy, (0, 3, 1, 2)), [STRIPS, 16, N])
    return b_xy


@triton.jit
def _add_row_sums(b_x, b_sum, STRIPS: tl.constexpr, BS: tl.constexpr, SUMS: tl.constexpr):
    """`add_row_sums`, over [(STRIPS,) BM, BS]."""
    if STRIPS == 1:
        return add_row_sums(b_x, b_sum)
    else:
        return tl.dot(b_x, tl.full([STRIPS, BS, SUMS], 1.0, b_x.dtype), b_sum)


@triton.jit
def _warm(p_x):
    """Have what lies at these addresses brought to L2."""
    tl.inline_asm_elementwise(
        "{prefetch.global.L2 [$1]; mov.b32 $0, 0;}", "=r,l", [p_x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _warm_rows(x, strides, i_b, i_g, GROUP: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr):
    """Have the queries or probes of a group brought to L2."""
    o_m = tl.minimum(tl.arange(0, BM), M - 1)
    i_x = tl.cast(i_b, tl.int64) * strides[0] + tl.cast(i_g, tl.int64) * GROUP * strides[2]
    p_x = x + i_x + (o_m // GROUP * strides[1] + o_m % GROUP * strides[2])[:, None]
    _warm(p_x + (tl.arange(0, K // 64) * 64)[None, :])


@triton.jit
def _scaled_rows(b_x, b_scale, STRIPS: tl.constexpr, STACK: tl.constexpr):
    """Multiply the rows of [(STRIPS,) BM, N] by [(STRIPS,) R]."""
    b_scale = tl.expand_dims(b_scale, -1)
    if STACK:
        b_scale = _stack(b_scale, b_scale, STRIPS, 1)
    return b_x * b_scale


@triton.jit(do_not_specialize=["num_splits", "window_size", "max_pages"])
def _parallax_decode_kernel(
    q, r, k, v, page_table, cache_seqlens, o, parts, stats,
    q_strides, r_strides, k_strides, v_strides, num_splits, max_pages, window_size, scale,
    T: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BS: tl.constexpr, STRIPS: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
    WINDOW: tl.constexpr, PROBE: tl.constexpr, STACK: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
    SUMS: tl.constexpr, EARLY: tl.constexpr = True, WARM: tl.constexpr = True,
):  # fmt: skip
    """Attend to one split of one kv head's cache; one program each.

    With STRIPS > 1 all blocks have a leading dimension of strips, one a warp, which differ in their keys: each
    warp has softmaxes of its own until the end. With STACK rows 0 to 7 are of queries, rows 8 to 15 of probes.
    """
    M: tl.constexpr = T * GROUP
    # rows of the softmax; the axis of keys
    R: tl.constexpr = 8 if STACK else BM
    LAST: tl.constexpr = 1 if STRIPS == 1 else 2
    TILE: tl.constexpr = BS * STRIPS
    scale_log2 = scale * LOG2E
    i_p = tl.program_id(0)
    # the heads of a sequence side by side: they share the cache's rows
    i_g = i_p % G
    i_n = i_p // G % num_splits
    i_b = i_p // G // num_splits
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        if WARM:
            _warm(cache_seqlens + i_b + tl.arange(0, 1))
            _warm_rows(q, q_strides, i_b, i_g, GROUP, K, M, BM)
            if PROBE:
                _warm_rows(r, r_strides, i_b, i_g, GROUP, K, M, BM)
        tl.extra.cuda.gdc_wait()

    num_keys = tl.load(cache_seqlens + i_b)
    i_first = 0
    if WINDOW:
        i_first = tl.maximum(num_keys - T + 1 - window_size, 0)
    per_split = tl.cdiv(tl.cdiv(num_keys - i_first, num_splits), TILE) * TILE
    i_start = i_first + i_n * per_split
    i_end = tl.minimum(i_start + per_split, num_keys)

    o_m = tl.arange(0, BM)
    o_k = tl.arange(0, K)
    b_q = _load_rows(q, q_strides, i_b, i_g, o_m, GROUP, K, M, 0)
    b_r = b_q
    if PROBE:
        b_r = _load_rows(r, r_strides, i_b, i_g, o_m, GROUP, K, M, 8 if STACK else 0)
    if STACK:
        b_q = tl.where((o_m < 8)[:, None], b_q, b_r)
    o_r = tl.arange(0, R)
    # the last key that a row sees
    o_last = num_keys - T + o_r // GROUP
    o_key = tl.arange(0, BS)
    if STRIPS == 1:
        b_m = tl.full([R], -1.0e30, tl.float32)
        b_d1 = tl.zeros([BM, SUMS], tl.float32)
        b_o1 = tl.zeros([BM, K], tl.float32)
    else:
        o_key = (tl.arange(0, STRIPS) * BS)[:, None] + o_key[None, :]
        b_q = tl.broadcast_to(b_q[None], [STRIPS, BM, K])
        b_r = tl.broadcast_to(b_r[None], [STRIPS, BM, K])
        b_m = tl.full([STRIPS, R], -1.0e30, tl.float32)
        b_d1 = tl.zeros([STRIPS, BM, SUMS], tl.float32)
        b_o1 = tl.zeros([STRIPS, BM, K], tl.float32)
    b_c = tl.zeros_like(b_m)
    b_d2 = tl.zeros_like(b_d1)
    b_o2 = tl.zeros_like(b_o1)
    k_head = k + tl.cast(i_g, tl.int64) * k_strides[2]
    v_head = v + tl.cast(i_g, tl.int64) * v_strides[2]
    for i_s in tl.range(i_start, i_end, TILE, num_stages=STAGES):
        # [(STRIPS,) BS]
        o_s = i_s + o_key
        m_s = o_s < i_end
        if PAGED:
            i_page = tl.load(page_table + tl.cast(i_b, tl.int64) * max_pages + o_s // PAGE, mask=m_s, other=0)
            i_k = i_page.to(tl.int64) * k_strides[0] + (o_s % PAGE).to(tl.int64) * k_strides[1]
            i_v = i_page.to(tl.int64) * v_strides[0] + (o_s % PAGE).to(tl.int64) * v_strides[1]
        else:
            i_k = tl.cast(i_b, tl.int64) * k_strides[0] + o_s.to(tl.int64) * k_strides[1]
            i_v = tl.cast(i_b, tl.int64) * v_strides[0] + o_s.to(tl.int64) * v_strides[1]
        # [(STRIPS,) BS, K]; zeros past the end, whatever the cache holds there
        m_k = tl.expand_dims(m_s, -1)
        b_k = tl.load(k_head + tl.expand_dims(i_k, -1) + o_k, mask=m_k, other=0.0)
        b_v = tl.load(v_head + tl.expand_dims(i_v, -1) + o_k, mask=m_k, other=0.0)
        b_k = tl.trans(b_k) if STRIPS == 1 else tl.permute(b_k, (0, 2, 1))
        # [(STRIPS,) R, BS]
        o_s = tl.expand_dims(o_s, -2)
        m_x = tl.expand_dims(m_s, -2) & (o_s <= o_last[:, None])
        if WINDOW:
            m_x = m_x & (o_s > (o_last - window_size)[:, None])
        b_s = tl.dot(b_q, b_k)
        b_t = b_s
        if STACK:
            b_s, b_t = _halves(b_s, STRIPS, BS)
        elif PROBE:
            b_t = tl.dot(b_r, b_k)
        b_s = tl.where(m_x, b_s * scale_log2, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, LAST))
        b_alpha = tl.math.exp2(b_m - b_m_new)
        b_p1 = tl.math.exp2(b_s - tl.expand_dims(b_m_new, -1))
        b_d1 = _scaled_rows(b_d1, b_alpha, STRIPS, STACK)
        b_o1 = _scaled_rows(b_o1, b_alpha, STRIPS, STACK)
        if PROBE:
            if i_s == i_start:
                # the largest weight that a row sees is one; a row that sees nothing here weighs nothing
                b_c = tl.sum(b_p1 * b_t, LAST) / tl.maximum(tl.sum(b_p1, LAST), 0.5)
            b_p2 = b_p1 * (b_t - tl.expand_dims(b_c, -1))
            if STACK:
                b_p1 = _stack(b_p1, b_p2, STRIPS, BS)
            else:
                b_p2 = b_p2.to(b_v.dtype)
                b_d2 = _add_row_sums(b_p2, _scaled_rows(b_d2, b_alpha, STRIPS, False), STRIPS, BS, SUMS)
                b_o2 = tl.dot(b_p2, b_v, _scaled_rows(b_o2, b_alpha, STRIPS, False))
        b_p1 = b_p1.to(b_v.dtype)
        b_d1 = _add_row_sums(b_p1, b_d1, STRIPS, BS, SUMS)
        b_o1 = tl.dot(b_p1, b_v, b_o1)
        b_m = b_m_new
    if PDL:
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()

    if STACK:
        b_d1, b_d2 = _halves(b_d1, STRIPS, SUMS)
        b_o1, b_o2 = _halves(b_o1, STRIPS, K)
    b_d1 = tl.max(b_d1, LAST)
    if PROBE:
        b_d2 = tl.max(b_d2, LAST)
    if STRIPS > 1:
        b_top = tl.max(b_m, 0)
        b_w = tl.math.exp2(b_m - b_top[None, :])
        b_m = b_top
        if PROBE:
            # one zero of t for all strips
            b_d2 = tl.sum((b_d2 + b_d1 * b_c) * b_w, 0)
            b_o2 = (b_o2 + b_o1 * b_c[:, :, None]) * b_w[:, :, None]
            b_c = tl.zeros([R], tl.float32)
        b_d1 = tl.sum(b_d1 * b_w, 0)
        b_o1 = b_o1 * b_w[:, :, None]
        if STACK:
            b_o1, b_o2 = _halves(tl.sum(_stack(b_o1, b_o2, STRIPS, K), 0), 1, K)
        else:
            b_o1 = tl.sum(b_o1, 0)
            if PROBE:
                b_o2 = tl.sum(b_o2, 0)
    b_inverse = 1.0 / tl.maximum(b_d1, 0.5)
    b_vbar = b_o1 * b_inverse[:, None]
    if PROBE:
        b_shift = b_d2 * b_inverse
        b_correction = b_o2 * b_inverse[:, None] - b_vbar * b_shift[:, None]
    # [B, T, H]
    i_row = (tl.cast(i_b, tl.int64) * T + o_r // GROUP) * (G * GROUP) + i_g * GROUP + o_r % GROUP
    m_r = o_r < M
    if not SPLIT:
        b_o = b_vbar
        if PROBE:
            b_o -= b_correction
        p_o = o + i_row[:, None] * K + o_k[None, :]
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_r[:, None])
    else:
        i_row = i_row * num_splits + i_n
        tl.store(stats + i_row * 2, tl.where(b_d1 > 0.0, b_m + tl.math.log2(b_d1), -1.0e30), mask=m_r)
        p_o = parts + i_row[:, None] * (2 * K) + o_k[None, :]
        tl.store(p_o, b_vbar, mask=m_r[:, None])
        if PROBE:
            tl.store(stats + i_row * 2 + 1, b_c + b_shift, mask=m_r)
            tl.store(p_o + K, b_correction, mask=m_r[:, None])


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits_kernel(
    parts, stats, o, num_splits,
    K: tl.constexpr, BN: tl.constexpr, PROBE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row of o; one program each."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i_row = tl.cast(tl.program_id(0), tl.int64)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, K)
    m_n = o_n < num_splits
    p_x = parts + (i_row * num_splits + o_n)[:, None] * (2 * K) + o_k[None, :]
    # all loads before the first use; a split without keys has left zeros
    b_lse = tl.load(stats + (i_row * num_splits + o_n) * 2, mask=m_n, other=-1.0e30)
    # [BN, K]
    b_o = tl.load(p_x, mask=m_n[:, None], other=0.0)
    if PROBE:
        b_tbar = tl.load(stats + (i_row * num_splits + o_n) * 2 + 1, mask=m_n, other=0.0)
        b_correction = tl.load(p_x + K, mask=m_n[:, None], other=0.0)
    b_w = tl.math.exp2(b_lse - tl.max(b_lse, 0))
    # a split without keys weighs nothing, also where all are so
    b_w = tl.where(b_lse > -1.0e29, b_w, 0.0)
    b_w = b_w / tl.maximum(tl.sum(b_w, 0), 0.5)
    if PROBE:
        b_o = b_o * (1.0 + tl.sum(b_w * b_tbar, 0) - b_tbar)[:, None] - b_correction
    tl.store(o + i_row * K + o_k, tl.sum(b_o * b_w[:, None], 0).to(o.dtype.element_ty))


class DecodeTile(NamedTuple):
    """How a call is cut.

    Attributes:
        num_splits: Splits along the cache.
        block_s: Keys in a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
    """

    num_splits: int
    block_s: int
    num_warps: int
    num_stages: int
    num_strips: int = 1


def tile_of(
    num_pairs: int, capacity: int, num_rows: int, head_dim: int, num_multiprocessors: int
) -> DecodeTile:
    """Return how a call is cut: by its size and the device's, never by the sequences' lengths.

    Of all numbers of splits the one whose programs are done first, by a model of what
    `benchmarks/tune_decode.py` measured on an H100: two programs run on a multiprocessor; 0.7 of the
    multiprocessors with one program each read as fast as memory allows, fewer in proportion; splits cost 5%,
    and the time of reading 64 keys by every multiprocessor. A program that has its multiprocessor to itself
    keeps one tile more in flight.

    Args:
        num_pairs: Batch times kv heads.
        capacity: Keys that a query can see at most.
        num_rows: New tokens times query heads of a kv head.
        head_dim: Head width K.
        num_multiprocessors: Of the device.
    """
    enough = 0.7 * num_multiprocessors

    def cost(num_splits: int) -> float:
        num_full, num_last = divmod(num_pairs * num_splits, 2 * num_multiprocessors)
        keys = (
            (2 * num_full * num_multiprocessors + max(num_last, enough * (num_last > 0)))
            * capacity
            / num_splits
        )
        return keys if num_splits == 1 else 1.05 * keys + 64 * num_multiprocessors

    candidates = [n for n in SPLITS if n == 1 or n * 64 <= capacity]
    # as many bytes in flight for narrow heads as for wide ones; many rows need the registers themselves
    block_s = 64 * 128 // head_dim if num_rows <= 16 else 32
    num_splits = min(candidates, key=cost)
    num_stages = 4 if num_pairs * num_splits <= num_multiprocessors and num_rows <= 16 else 3
    return DecodeTile(num_splits, block_s, 8 if num_rows > 64 else 4, num_stages)


def refusal(q: Tensor, k_cache: Tensor) -> str | None:
    """Return why the kernels cannot serve these inputs, or None.

    Args:
        q: Queries `[B, T, H, K]`.
        k_cache: Keys `[B, S, G, K]` or pages of them.
    """
    if q.device.type != "cuda":
        return f"needs CUDA, got {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"serves bfloat16 and float16, got {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"serves the head widths {', '.join(map(str, HEAD_DIMS))}, got {q.shape[3]}"
    if q.shape[1] > MAX_NEW_TOKENS:
        return f"serves up to {MAX_NEW_TOKENS} new tokens, got {q.shape[1]}"
    if q.shape[2] // k_cache.shape[2] > MAX_GROUP:
        return f"serves up to {MAX_GROUP} query heads a kv head, got {q.shape[2] // k_cache.shape[2]}"
    return None


def decode(
    q: Tensor,
    r: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    window_size: int | None,
    scale: float,
    out: Tensor,
    *,
    tile: DecodeTile | None = None,
) -> None:
    """Launch the decode kernels. Nothing is read back to the host.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16, last dimension contiguous, as of all inputs.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k_cache: Keys `[B, S, G, K]`, or pages `[P, page size, G, K]`.
        v_cache: Values, as the keys.
        cache_seqlens: Keys of each sequence `[B]` int32, the new tokens' included.
        page_table: Pages of each sequence `[B, pages]` int32, or None.
        window_size: Newest keys that a query sees, its own included; None for all.
        scale: Factor of q.k.
        out: `[B, T, H, K]`, contiguous, is written.
        tile: For tuning; None takes the table's.
    """
    batch_size, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    if q.numel() == 0:
        return
    page_size = k_cache.shape[1]
    capacity = page_size if page_table is None else page_table.shape[1] * page_size
    if window_size is not None:
        capacity = min(capacity, window_size + num_tokens - 1)
    if tile is None:
        properties = torch.cuda.get_device_properties(q.device)
        rows = num_tokens * num_heads // num_kv_heads
        tile = tile_of(batch_size * num_kv_heads, capacity, rows, head_dim, properties.multi_processor_count)
    num_splits = tile.num_splits
    parts = stats = out
    if num_splits > 1:
        shape = (batch_size, num_tokens, num_heads, num_splits, 2)
        parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(shape, dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    has_probe = r is not None
    use_pdl = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    launch = {"launch_pdl": True} if use_pdl else {}
    probe = q if r is None else r
    _parallax_decode_kernel[(batch_size * num_splits * num_kv_heads,)](
        q, probe, k_cache, v_cache, page_table, cache_seqlens, out, parts, stats,
        _strides(q), _strides(probe), _strides(k_cache), _strides(v_cache),
        num_splits, 0 if page_table is None else page_table.stride(0), window_size or 0, scale,
        T=num_tokens, G=num_kv_heads, GROUP=group, K=head_dim,
        BM=max(16, triton.next_power_of_2(num_tokens * group)), BS=tile.block_s // tile.num_strips,
        STRIPS=tile.num_strips, SPLIT=num_splits > 1, STACK=has_probe and num_tokens * group <= 8,
        PAGE=page_size if page_table is not None else 1, PAGED=page_table is not None,
        WINDOW=window_size is not None, PROBE=has_probe, PDL=use_pdl, STAGES=tile.num_stages, SUMS=8,
        num_warps=tile.num_warps, **launch,
    )  # fmt: skip
    if num_splits > 1:
        _merge_splits_kernel[(batch_size * num_tokens * num_heads,)](
            parts, stats, out, num_splits, K=head_dim, BN=max(2, triton.next_power_of_2(num_splits)),
            PROBE=has_probe, PDL=use_pdl, num_warps=4, **launch,
        )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)
