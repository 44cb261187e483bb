"""Decode kernels: attention of a few new queries per sequence over its KV cache.

They compute (1) to (6) and (12) of `parallax.reference` with split-KV (flash decoding): the cache is divided
into splits along its tokens, so that a few long sequences fill the device too. A program takes one split of
one kv head; all query heads of the group and all new tokens are the rows of one tile, so keys and values are
read once. Tiles have at least sixteen rows for the tensor cores. Up to eight queries have their probes in
rows 8 to 15 of the same tile, so that Parallax takes as many products as softmax attention, and a thread
holds the scores of a query and of its probe in registers.

With weights p = exp(s - m) relative to the split's largest score m, and a centre c of t, a split sums
d1 = Sigma p, d2 = Sigma p (t - c), o1 = Sigma p v and o2 = Sigma p (t - c) v. It stores m, d1, d2 + c d1, o1
and o2 + c o1 for a second kernel, which adds them over the splits in fp32, each times exp(m - max m):

    o = (o1 (1 + d2 / d1) - o2) / d1.

Programmatic dependent launch (from Hopper on) overlaps launches with the previous kernel: programs start
before their inputs are ready, and meanwhile prefetch small inputs to L2.

Splits divide the keys of a sequence, not the cache's capacity, so one CUDA graph serves all lengths.
Letters as in `parallax.kernels.addressing`; M rows: new tokens times heads of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallax.kernels.addressing import LOG2E, strides_of
from parallax.kernels.decode_tiles import DecodeDevice, DecodeTile, tile_of
from parallax.kernels.row_sums import add_row_sums

HEAD_DIMS = (64, 128)
"""Supported head widths."""

MAX_NEW_TOKENS = 8
"""Maximum number of new tokens per sequence and call."""

MAX_GROUP = 16
"""Maximum number of query heads per kv head."""

MERGE_COLUMNS = 32
"""Columns of o per merging program: on an H200, 64 and 128 make a call 3% and 7% slower, 16 equally fast."""


@triton.jit
def _load_rows(
    x, strides, i_b, i_g, o_m, GROUP: tl.constexpr, K: tl.constexpr, M: tl.constexpr, FIRST: tl.constexpr
):
    """Load the queries or probes of a group into rows FIRST to FIRST + M, [BM, K]; zeros elsewhere.

    Row FIRST + m is token m // GROUP, head m % GROUP.
    """
    o_k = tl.arange(0, K)
    o_x = o_m - FIRST
    i_x = tl.cast(i_b, tl.int64) * strides[0] + tl.cast(i_g, tl.int64) * GROUP * strides[2]
    p_x = x + i_x + (o_x // GROUP * strides[1] + o_x % GROUP * strides[2])[:, None] + o_k[None, :]
    return tl.load(p_x, mask=((o_x >= 0) & (o_x < M))[:, None], other=0.0)


@triton.jit
def _halves(b_x, N: tl.constexpr):
    """Split [16, N] into rows 0 to 7 and 8 to 15; a thread holds elements i and i + 8 in its registers."""
    return tl.split(tl.permute(tl.reshape(b_x, [2, 8, N]), (1, 2, 0)))


@triton.jit
def _stack(b_x, b_y, N: tl.constexpr):
    """Concatenate [8, N] and [8, N] to [16, N], the inverse of _halves."""
    return tl.reshape(tl.permute(tl.join(b_x, b_y), (2, 0, 1)), [16, N])


@triton.jit
def _add_pairs(b_x, b_y, b_u, b_w):
    return b_x + b_u, b_y + b_w


@triton.jit
def _prefetch(p_x):
    """Prefetch these addresses to L2; nothing is read, so a previous kernel may still write to them."""
    tl.inline_asm_elementwise(
        "{prefetch.global.L2 [$1]; mov.b32 $0, 0;}", "=r,l", [p_x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _prefetch_rows(
    x, strides, i_b, i_g, GROUP: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr
):
    """Prefetch the queries or probes of a group to L2."""
    o_m = tl.minimum(tl.arange(0, BM), M - 1)
    i_x = tl.cast(i_b, tl.int64) * strides[0] + tl.cast(i_g, tl.int64) * GROUP * strides[2]
    p_x = x + i_x + (o_m // GROUP * strides[1] + o_m % GROUP * strides[2])[:, None]
    _prefetch(p_x + (tl.arange(0, K // 64) * 64)[None, :])


@triton.jit(do_not_specialize=["num_splits", "window_size", "max_pages"])
def _parallax_decode_kernel(
    q, r, k, v, page_table, cache_seqlens, o, parts, stats,
    q_strides, r_strides, k_strides, v_strides, num_splits, max_pages, window_size, scale,
    T: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BS: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr,
    WINDOW: tl.constexpr, PROBE: tl.constexpr, STACK: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the sums of one split of one kv head's cache per program; without splits the output.

    With STACK rows 0 to 7 of the tiles are queries, rows 8 to 15 probes.
    """
    M: tl.constexpr = T * GROUP
    # rows of the softmax
    R: tl.constexpr = BM // 2 if STACK else BM
    scale_log2 = scale * LOG2E
    i_p = tl.program_id(0)
    # neighbouring programs take the heads of one sequence, whose keys are adjacent in the cache
    i_g = i_p % G
    i_n = i_p // G % num_splits
    i_b = i_p // G // num_splits
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        _prefetch(cache_seqlens + i_b + tl.arange(0, 1))
        _prefetch_rows(q, q_strides, i_b, i_g, GROUP, K, M, BM)
        if PROBE:
            _prefetch_rows(r, r_strides, i_b, i_g, GROUP, K, M, BM)
        tl.extra.cuda.gdc_wait()

    num_keys = tl.load(cache_seqlens + i_b)
    i_first = 0
    if WINDOW:
        i_first = tl.maximum(num_keys - T + 1 - window_size, 0)
    per_split = tl.cdiv(tl.cdiv(num_keys - i_first, num_splits), BS) * BS
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
    # last visible key of each row
    o_last = num_keys - T + o_r // GROUP
    b_m = tl.full([R], -1.0e30, tl.float32)
    b_c = tl.zeros([R], tl.float32)
    b_d1 = tl.zeros([BM, SUMS], tl.float32)
    b_d2 = tl.zeros([BM, SUMS], tl.float32)
    b_o1 = tl.zeros([BM, K], tl.float32)
    b_o2 = tl.zeros([BM, K], tl.float32)
    k_head = k + tl.cast(i_g, tl.int64) * k_strides[2]
    v_head = v + tl.cast(i_g, tl.int64) * v_strides[2]
    for i_s in tl.range(i_start, i_end, BS, num_stages=STAGES):
        o_s = i_s + tl.arange(0, BS)
        m_s = o_s < i_end
        if PAGED:
            i_page = tl.load(page_table + tl.cast(i_b, tl.int64) * max_pages + o_s // PAGE, mask=m_s, other=0)
            i_k = i_page.to(tl.int64) * k_strides[0] + (o_s % PAGE).to(tl.int64) * k_strides[1]
            i_v = i_page.to(tl.int64) * v_strides[0] + (o_s % PAGE).to(tl.int64) * v_strides[1]
        else:
            i_k = tl.cast(i_b, tl.int64) * k_strides[0] + o_s.to(tl.int64) * k_strides[1]
            i_v = tl.cast(i_b, tl.int64) * v_strides[0] + o_s.to(tl.int64) * v_strides[1]
        # [BS, K]; zeros past the end, where the cache may hold NaN
        b_k = tl.load(k_head + i_k[:, None] + o_k[None, :], mask=m_s[:, None], other=0.0)
        b_v = tl.load(v_head + i_v[:, None] + o_k[None, :], mask=m_s[:, None], other=0.0)
        # [R, BS]
        m_x = m_s[None, :] & (o_s[None, :] <= o_last[:, None])
        if WINDOW:
            m_x = m_x & (o_s[None, :] > (o_last - window_size)[:, None])
        b_s = tl.dot(b_q, tl.trans(b_k))
        b_t = b_s
        if STACK:
            b_s, b_t = _halves(b_s, BS)
        elif PROBE:
            b_t = tl.dot(b_r, tl.trans(b_k))
        b_s = tl.where(m_x, b_s * scale_log2, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_alpha = tl.math.exp2(b_m - b_m_new)[:, None]
        b_p1 = tl.math.exp2(b_s - b_m_new[:, None])
        if PROBE:
            if i_s == i_start:
                # the largest visible weight is one; the weights of a row without visible keys are zero
                b_sum_t, b_sum = tl.reduce((b_p1 * b_t, b_p1), 1, _add_pairs)
                b_c = b_sum_t / tl.maximum(b_sum, 0.5)
            b_p2 = b_p1 * (b_t - b_c[:, None])
            if STACK:
                b_p1 = _stack(b_p1, b_p2, BS)
                b_alpha = _stack(b_alpha, b_alpha, 1)
            else:
                b_p2 = b_p2.to(b_v.dtype)
                b_d2 = add_row_sums(b_p2, b_d2 * b_alpha)
                b_o2 = tl.dot(b_p2, b_v, b_o2 * b_alpha)
        b_p1 = b_p1.to(b_v.dtype)
        b_d1 = add_row_sums(b_p1, b_d1 * b_alpha)
        b_o1 = tl.dot(b_p1, b_v, b_o1 * b_alpha)
        b_m = b_m_new
    if STACK:
        b_d1, b_d2 = _halves(b_d1, SUMS)
        b_o1, b_o2 = _halves(b_o1, K)
    b_d1 = tl.max(b_d1, 1)
    b_d2 = tl.max(b_d2, 1)
    # [B, T, H]
    i_row = (tl.cast(i_b, tl.int64) * T + o_r // GROUP) * (G * GROUP) + i_g * GROUP + o_r % GROUP
    m_r = o_r < M
    if SPLIT:
        i_row = i_row * num_splits + i_n
        tl.store(stats + i_row * 3, b_m, mask=m_r)
        tl.store(stats + i_row * 3 + 1, b_d1, mask=m_r)
        p_o = parts + i_row[:, None] * (2 * K) + o_k[None, :]
        tl.store(p_o, b_o1, mask=m_r[:, None])
        if PROBE:
            tl.store(stats + i_row * 3 + 2, b_d2 + b_c * b_d1, mask=m_r)
            tl.store(p_o + K, b_o2 + b_c[:, None] * b_o1, mask=m_r[:, None])
    else:
        b_inverse = 1.0 / tl.maximum(b_d1, 0.5)
        if PROBE:
            b_o1 = b_o1 * (1.0 + b_d2 * b_inverse)[:, None] - b_o2
        p_o = o + i_row[:, None] * K + o_k[None, :]
        tl.store(p_o, (b_o1 * b_inverse[:, None]).to(o.dtype.element_ty), mask=m_r[:, None])


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits_kernel(
    parts, stats, o, num_splits,
    K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PROBE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of BK columns of a row of o per program, of one warp."""
    i_row = tl.cast(tl.program_id(0), tl.int64) // (K // BK)
    o_k = tl.program_id(0) % (K // BK) * BK + tl.arange(0, BK)
    o_n = tl.arange(0, BN)
    m_n = o_n < num_splits
    p_x = parts + (i_row * num_splits + o_n)[:, None] * (2 * K) + o_k[None, :]
    p_stats = stats + (i_row * num_splits + o_n) * 3
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # all loads before the first use; a split without keys has stored zeros
    b_m = tl.load(p_stats, mask=m_n, other=-1.0e30)
    b_d1 = tl.load(p_stats + 1, mask=m_n, other=0.0)
    # [BN, BK]
    b_o1 = tl.load(p_x, mask=m_n[:, None], other=0.0)
    b_d2, b_o2 = b_d1, b_o1
    if PROBE:
        b_d2 = tl.load(p_stats + 2, mask=m_n, other=0.0)
        b_o2 = tl.load(p_x + K, mask=m_n[:, None], other=0.0)
    b_w = tl.math.exp2(b_m - tl.max(b_m, 0))
    b_o = tl.sum(b_o1 * b_w[:, None], 0)
    if PROBE:
        b_d1, b_d2 = tl.reduce((b_d1 * b_w, b_d2 * b_w), 0, _add_pairs)
        b_inverse = 1.0 / tl.maximum(b_d1, 0.5)
        b_o = b_o * (1.0 + b_d2 * b_inverse) - tl.sum(b_o2 * b_w[:, None], 0)
    else:
        b_inverse = 1.0 / tl.maximum(tl.sum(b_d1 * b_w, 0), 0.5)
    tl.store(o + i_row * K + o_k, (b_o * b_inverse).to(o.dtype.element_ty))


def refusal(q: Tensor, k_cache: Tensor) -> str | None:
    """Return why the kernels do not support these inputs, or None if they do.

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
        return f"serves up to {MAX_GROUP} query heads per kv head, got {q.shape[2] // k_cache.shape[2]}"
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
    """Compute attention over a KV cache by the decode kernels, without host synchronization.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16, last dimension contiguous, as in all inputs.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k_cache: Keys `[B, S, G, K]`, or pages `[P, page size, G, K]`.
        v_cache: Values, as the keys.
        cache_seqlens: Keys of each sequence `[B]` int32, the new tokens' included.
        page_table: Pages of each sequence `[B, pages]` int32, or None.
        window_size: Newest keys that a query sees, its own included; None for all.
        scale: Factor of q.k.
        out: Output `[B, T, H, K]` to write to, contiguous.
        tile: Tile to tune; None for that of `parallax.kernels.decode_tiles`.
    """
    batch_size, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    if q.numel() == 0:
        return
    page_size = k_cache.shape[1]
    capacity = page_size if page_table is None else page_table.shape[1] * page_size
    if window_size is not None:
        # the kernel's differences would overflow for windows near 2^31
        window_size = min(window_size, capacity)
        capacity = min(capacity, window_size + num_tokens - 1)
    if tile is None:
        device = DecodeDevice.of(torch.cuda.get_device_properties(q.device))
        rows = num_tokens * num_heads // num_kv_heads
        tile = tile_of(batch_size * num_kv_heads, capacity, rows, head_dim, device)
    num_splits = tile.num_splits
    parts = stats = out
    if num_splits > 1:
        shape = (batch_size, num_tokens, num_heads, num_splits)
        parts = torch.empty(*shape, 2, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(*shape, 3, dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    has_probe = r is not None
    use_pdl = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    launch = {"launch_pdl": True} if use_pdl else {}
    probe = q if r is None else r
    _parallax_decode_kernel[(batch_size * num_splits * num_kv_heads,)](
        q, probe, k_cache, v_cache, page_table, cache_seqlens, out, parts, stats,
        strides_of(q), strides_of(probe), strides_of(k_cache), strides_of(v_cache),
        num_splits, 0 if page_table is None else page_table.stride(0), window_size or 0, scale,
        T=num_tokens, G=num_kv_heads, GROUP=group, K=head_dim,
        BM=max(16, triton.next_power_of_2(num_tokens * group)), BS=tile.block_s,
        SPLIT=num_splits > 1, STACK=has_probe and num_tokens * group <= 8,
        PAGE=page_size if page_table is not None else 1, PAGED=page_table is not None,
        WINDOW=window_size is not None, PROBE=has_probe, PDL=use_pdl, STAGES=tile.num_stages, SUMS=8,
        num_warps=tile.num_warps, **launch,
    )  # fmt: skip
    if num_splits > 1:
        _merge_splits_kernel[(q.numel() // MERGE_COLUMNS,)](
            parts, stats, out, num_splits,
            K=head_dim, BK=MERGE_COLUMNS, BN=triton.next_power_of_2(num_splits), PROBE=has_probe, PDL=use_pdl,
            num_warps=1, **launch,
        )  # fmt: skip
