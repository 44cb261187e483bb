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
def _load_rows(x, strides, i_b, i_g, o_m, GROUP: tl.constexpr, K: tl.constexpr, M: tl.constexpr):
    """Load the queries or probes of a group, [BM, K]: row m is token m // GROUP, head m % GROUP."""
    o_k = tl.arange(0, K)
    i_x = tl.cast(i_b, tl.int64) * strides[0] + tl.cast(i_g, tl.int64) * GROUP * strides[2]
    p_x = x + i_x + (o_m // GROUP * strides[1] + o_m % GROUP * strides[2])[:, None] + o_k[None, :]
    return tl.load(p_x, mask=(o_m < M)[:, None], other=0.0)


@triton.jit(do_not_specialize=["num_splits", "window_size", "max_pages"])
def _parallax_decode_kernel(
    q, r, k, v, page_table, cache_seqlens, o, parts, stats,
    q_strides, r_strides, k_strides, v_strides, num_splits, max_pages, window_size, scale,
    T: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BS: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr, PAGED: tl.constexpr, WINDOW: tl.constexpr,
    PROBE: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Attend to one split of one kv head's cache; one program each."""
    M: tl.constexpr = T * GROUP
    scale_log2 = scale * LOG2E
    if PDL:
        tl.extra.cuda.gdc_wait()
    i_p = tl.program_id(0)
    # the heads of a sequence side by side: they share the cache's rows
    i_g = i_p % G
    i_n = i_p // G % num_splits
    i_b = i_p // G // num_splits

    num_keys = tl.load(cache_seqlens + i_b)
    i_first = 0
    if WINDOW:
        i_first = tl.maximum(num_keys - T + 1 - window_size, 0)
    per_split = tl.cdiv(tl.cdiv(num_keys - i_first, num_splits), BS) * BS
    i_start = i_first + i_n * per_split
    i_end = tl.minimum(i_start + per_split, num_keys)

    o_m = tl.arange(0, BM)
    o_k = tl.arange(0, K)
    # the last key that a row sees
    o_last = num_keys - T + o_m // GROUP
    b_q = _load_rows(q, q_strides, i_b, i_g, o_m, GROUP, K, M)
    b_m = tl.full([BM], -1.0e30, tl.float32)
    b_c = tl.zeros([BM], tl.float32)
    b_d1 = tl.zeros([BM, SUMS], tl.float32)
    b_d2 = tl.zeros([BM, SUMS], tl.float32)
    b_o1 = tl.zeros([BM, K], tl.float32)
    b_o2 = tl.zeros([BM, K], tl.float32)
    b_r = b_q
    if PROBE:
        b_r = _load_rows(r, r_strides, i_b, i_g, o_m, GROUP, K, M)
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
        # [BS, K]; zeros past the end, whatever the cache holds there
        b_k = tl.load(k_head + i_k[:, None] + o_k[None, :], mask=m_s[:, None], other=0.0)
        b_v = tl.load(v_head + i_v[:, None] + o_k[None, :], mask=m_s[:, None], other=0.0)
        # [BM, BS]
        m_x = m_s[None, :] & (o_s[None, :] <= o_last[:, None])
        if WINDOW:
            m_x = m_x & (o_s[None, :] > (o_last - window_size)[:, None])
        b_s = tl.where(m_x, tl.dot(b_q, tl.trans(b_k)) * scale_log2, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_alpha = tl.math.exp2(b_m - b_m_new)
        b_p1 = tl.math.exp2(b_s - b_m_new[:, None])
        if PROBE:
            b_t = tl.dot(b_r, tl.trans(b_k))
            if i_s == i_start:
                # the largest weight that a row sees is one; a row that sees nothing here weighs nothing
                b_c = tl.sum(b_p1 * b_t, 1) / tl.maximum(tl.sum(b_p1, 1), 0.5)
            b_p2 = (b_p1 * (b_t - b_c[:, None])).to(b_v.dtype)
            b_d2 = add_row_sums(b_p2, b_d2 * b_alpha[:, None])
            b_o2 = tl.dot(b_p2, b_v, b_o2 * b_alpha[:, None])
        b_p1 = b_p1.to(b_v.dtype)
        b_d1 = add_row_sums(b_p1, b_d1 * b_alpha[:, None])
        b_o1 = tl.dot(b_p1, b_v, b_o1 * b_alpha[:, None])
        b_m = b_m_new
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    b_d1 = tl.max(b_d1, 1)
    b_inverse = 1.0 / tl.maximum(b_d1, 0.5)
    b_vbar = b_o1 * b_inverse[:, None]
    b_shift = tl.max(b_d2, 1) * b_inverse
    b_correction = b_o2 * b_inverse[:, None] - b_vbar * b_shift[:, None]
    # [B, T, H]
    i_row = (tl.cast(i_b, tl.int64) * T + o_m // GROUP) * (G * GROUP) + i_g * GROUP + o_m % GROUP
    m_m = (o_m < M)[:, None]
    if not SPLIT:
        p_o = o + i_row[:, None] * K + o_k[None, :]
        tl.store(p_o, (b_vbar - b_correction).to(o.dtype.element_ty), mask=m_m)
    else:
        i_row = i_row * num_splits + i_n
        tl.store(stats + i_row * 2, tl.where(b_d1 > 0.0, b_m + tl.math.log2(b_d1), -1.0e30), mask=o_m < M)
        p_o = parts + i_row[:, None] * (2 * K) + o_k[None, :]
        tl.store(p_o, b_vbar, mask=m_m)
        if PROBE:
            tl.store(stats + i_row * 2 + 1, b_c + b_shift, mask=o_m < M)
            tl.store(p_o + K, b_correction, mask=m_m)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_splits_kernel(
    parts, stats, o, num_splits,
    K: tl.constexpr, BN: tl.constexpr, PROBE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row of o; one program each."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_row = tl.cast(tl.program_id(0), tl.int64)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, K)
    b_lse = tl.load(stats + (i_row * num_splits + o_n) * 2, mask=o_n < num_splits, other=-1.0e30)
    b_w = tl.math.exp2(b_lse - tl.max(b_lse, 0))
    # a split without keys weighs nothing, also where all are so
    b_w = tl.where(b_lse > -1.0e29, b_w, 0.0)
    b_w = b_w / tl.maximum(tl.sum(b_w, 0), 0.5)
    m_n = (b_w > 0.0)[:, None]
    p_x = parts + (i_row * num_splits + o_n)[:, None] * (2 * K) + o_k[None, :]
    # [BN, K]
    b_o = tl.load(p_x, mask=m_n, other=0.0)
    if PROBE:
        b_tbar = tl.load(stats + (i_row * num_splits + o_n) * 2 + 1, mask=b_w > 0.0, other=0.0)
        b_o = b_o * (1.0 + tl.sum(b_w * b_tbar, 0) - b_tbar)[:, None] - tl.load(p_x + K, mask=m_n, other=0.0)
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
        BM=max(16, triton.next_power_of_2(num_tokens * group)), BS=tile.block_s, SPLIT=num_splits > 1,
        PAGE=page_size if page_table is not None else 1, PAGED=page_table is not None,
        WINDOW=window_size is not None, PROBE=has_probe, PDL=use_pdl, STAGES=tile.num_stages, SUMS=8,
        num_warps=tile.num_warps, **launch,
    )  # fmt: skip
    if num_splits > 1:
        _merge_splits_kernel[(batch_size * num_tokens * num_heads,)](
            parts, stats, out, num_splits, K=head_dim, BN=64 if num_splits > 16 else 16,
            PROBE=has_probe, PDL=use_pdl, num_warps=4, **launch,
        )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)
