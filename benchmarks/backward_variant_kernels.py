"""Triton kernels of the alternative backward passes that `benchmarks.backward_variants` times.

Names and equations are those of `parallax.kernels.backward`.
"""

import triton
import triton.language as tl

from parallax.kernels.addressing import LOG2E, in_registers, load_tile, program_of
from parallax.kernels.backward import _load_row_constant
from parallax.kernels.row_sums import add_row_sums


@triton.jit(do_not_specialize=["T"])
def constants_kernel(
    do, o, vbar, lse, tbar, rows, strides, T, scale, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
):
    """Compute the row constants of `parallax.kernels.backward` for BT rows of one head."""
    i_bh = tl.program_id(1)
    i_b, i_h, i_t = i_bh // H, i_bh % H, tl.program_id(0) * BT
    o_t = i_t + tl.arange(0, BT)
    b_do = load_tile(do, strides, i_b, i_h, i_t, T, BT, K, K, False).to(tl.float32)
    b_total = tl.sum(b_do * load_tile(o, strides, i_b, i_h, i_t, T, BT, K, K, False), 1)
    b_b = tl.sum(b_do * load_tile(vbar, strides, i_b, i_h, i_t, T, BT, K, K, False), 1)
    p_t, p_rows = tl.cast(i_bh, tl.int64) * T + o_t, rows + tl.cast(i_bh, tl.int64) * 4 * T + o_t
    tl.store(p_rows, tl.load(lse + p_t) * LOG2E)
    tl.store(p_rows + T, (tl.load(tbar + p_t) + 1.0) * scale)
    tl.store(p_rows + 2 * T, b_b / scale)
    tl.store(p_rows + 3 * T, b_b - b_total)


@triton.jit
def _add_product(x, b_x, b_k, i_bh, i_t, T, BT: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):
    """Add K^T X^T [K, BT] to fp32 memory, from X^T [BS, BT]; X K would need at least 64 queries."""
    b_y = tl.dot(tl.trans(b_k), b_x, input_precision="ieee")
    if TMA:
        x.atomic_add([i_bh * K, i_t], b_y)
    else:
        p_x = x + tl.cast(i_bh, tl.int64) * K * T + i_t
        p_x = p_x + (tl.arange(0, K)[:, None] * T + tl.arange(0, BT)[None, :])
        tl.atomic_add(p_x, b_y, sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def convert_kernel(x, dq, T, scale, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """Convert BT rows of one head's dQ, or dR, from its fp32 buffer."""
    i_t, i_bh = tl.program_id(0) * BT, tl.program_id(1)
    p_x = tl.cast(i_bh, tl.int64) * K * T + i_t + (tl.arange(0, K)[:, None] * T + tl.arange(0, BT)[None, :])
    b_dq = (tl.trans(tl.load(x + p_x)) * scale).to(dq.dtype)
    dq.store([i_bh // H, i_bh % H, i_t, 0], b_dq.reshape(1, 1, BT, K))


@triton.jit(do_not_specialize=["T", "num_heads", "section"])
def keys_kernel(
    q, r, k, v, do, rows, dq, dr, dk, dv, T, num_heads, section, scale, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, OPTION: tl.constexpr):  # fmt: skip
    """Compute BS rows of one kv head's dK and dV; (b) also adds their parts of dQ / scale and dR / scale."""
    ONE_PASS: tl.constexpr = OPTION == "tma" or OPTION == "atomics"
    i_rank, i_bg = program_of(tl.program_id(0), T // BS, num_heads, section)
    i_s = i_rank * BS
    i_b, i_g = i_bg // G, i_bg % G
    b_k = load_tile(k, 0, i_b, i_g, i_s, T, BS, K, K, True)
    b_v = load_tile(v, 0, i_b, i_g, i_s, T, BS, K, K, True)
    if OPTION == "K in registers":
        b_k = in_registers(b_k, K)
    b_dk, b_dv = tl.zeros([BS, K], tl.float32), tl.zeros([BS, K], tl.float32)
    i_unmasked = tl.cdiv(i_s + BS, BT) * BT
    # each zone is one loop over all heads of the group, as in `parallax.kernels.backward`
    for ZONE in tl.static_range(2):
        i_first, i_end = (i_s // BT * BT, i_unmasked) if ZONE == 0 else (i_unmasked, T)
        i_h, i_t = i_g * (H // G), i_first
        for _ in tl.range(0, (i_end - i_first) // BT * (H // G), disable_licm=True):
            i_bh = i_b * H + i_h
            # [BT, K], stacked [Q; R] [2 BT, K]; then [BS, BT]
            if ONE_PASS:
                b_q = load_tile(q, 0, i_b, i_h, i_t, T, BT, K, K, True)
                b_r = load_tile(r, 0, i_b, i_h, i_t, T, BT, K, K, True)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                b_t = tl.dot(b_k, tl.trans(b_r), input_precision="ieee")
            else:
                b_q = q.load([i_b, i_h, 0, i_t, 0]).reshape(2 * BT, K)
                b_r = b_q
                b_st = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                b_s, b_t = tl.split(b_st.reshape(BS, 2, BT).permute(0, 2, 1))
            b_do = load_tile(do, 0, i_b, i_h, i_t, T, BT, K, K, True)
            b_a = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            # scale * (1 + tbar - t) and (b - a) / scale
            b_s = b_s * (scale * LOG2E) - _load_row_constant(rows, i_bh, 0, i_t, T, BT, True)[None, :]
            b_p = tl.math.exp2(b_s)
            b_t = _load_row_constant(rows, i_bh, 1, i_t, T, BT, True)[None, :] - b_t * scale
            b_a = _load_row_constant(rows, i_bh, 2, i_t, T, BT, True)[None, :] - b_a * (1.0 / scale)
            if ZONE == 0:
                o_t, o_s = i_t + tl.arange(0, BT), i_s + tl.arange(0, BS)
                b_p = tl.where(o_s[:, None] <= o_t[None, :], b_p, 0.0)
            b_w = b_p * b_t
            b_u = (b_p * b_a).to(b_do.dtype)
            b_g = b_p * _load_row_constant(rows, i_bh, 3, i_t, T, BT, True)[None, :] - b_w * b_a
            b_g = b_g.to(b_do.dtype)
            # [BS, K]
            b_dv = tl.dot(b_w.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            if ONE_PASS:
                b_dk = tl.dot(b_g, b_q, b_dk, input_precision="ieee")
                b_dk = tl.dot(b_u, b_r, b_dk, input_precision="ieee")
                _add_product(dq, b_g, b_k, i_bh, i_t, T, BT, K, OPTION == "tma")
                _add_product(dr, b_u, b_k, i_bh, i_t, T, BT, K, OPTION == "tma")
            else:
                b_gu = tl.join(b_g, b_u).permute(0, 2, 1).reshape(BS, 2 * BT)
                b_dk = tl.dot(b_gu, b_q, b_dk, input_precision="ieee")
            i_t += BT
            i_h = tl.where(i_t >= i_end, i_h + 1, i_h)
            i_t = tl.where(i_t >= i_end, i_first, i_t)
    dk.store([i_b, i_g, i_s, 0], (b_dk * scale).to(dk.dtype).reshape(1, 1, BS, K))
    dv.store([i_b, i_g, i_s, 0], (b_dv / scale).to(dv.dtype).reshape(1, 1, BS, K))


@triton.jit(do_not_specialize=["T", "num_heads", "section"])
def queries_kernel(
    q, r, k, v, do, rows, dq, dr, T, num_heads, section, scale, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Compute BT rows of one head's dQ and dR with [G; U] K as one product."""
    i_rank, i_bh = program_of(tl.program_id(0), T // BT, num_heads, section)
    i_t = (T // BT - 1 - i_rank) * BT
    i_b, i_h, i_g = i_bh // H, i_bh % H, i_bh % H // (H // G)
    b_lse = _load_row_constant(rows, i_bh, 0, i_t, T, BT, True)
    b_t1 = _load_row_constant(rows, i_bh, 1, i_t, T, BT, True)
    b_b = _load_row_constant(rows, i_bh, 2, i_t, T, BT, True)
    b_e = _load_row_constant(rows, i_bh, 3, i_t, T, BT, True)
    b_q = load_tile(q, 0, i_b, i_h, i_t, T, BT, K, K, True)
    b_r = load_tile(r, 0, i_b, i_h, i_t, T, BT, K, K, True)
    b_do = load_tile(do, 0, i_b, i_h, i_t, T, BT, K, K, True)
    b_d = tl.zeros([2 * BT, K], tl.float32)
    b_g_sum, b_u_sum = tl.zeros([BT, 8], tl.float32), tl.zeros([BT, 8], tl.float32)
    i_diagonal = i_t // BS * BS
    for ZONE in tl.static_range(2):
        i_first, i_end = (i_diagonal, i_t + BT) if ZONE == 0 else (0, i_diagonal)
        for i_s in tl.range(i_first, i_end, BS, disable_licm=True):
            b_k = load_tile(k, 0, i_b, i_g, i_s, T, BS, K, K, True)
            b_v = load_tile(v, 0, i_b, i_g, i_s, T, BS, K, K, True)
            # [BT, BS]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_t = tl.dot(b_r, tl.trans(b_k), input_precision="ieee")
            b_a = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_p = tl.math.exp2(b_s * (scale * LOG2E) - b_lse[:, None])
            b_t = b_t1[:, None] - b_t * scale
            b_a = b_b[:, None] - b_a * (1.0 / scale)
            if ZONE == 0:
                o_t, o_s = i_t + tl.arange(0, BT), i_s + tl.arange(0, BS)
                b_p = tl.where(o_s[None, :] <= o_t[:, None], b_p, 0.0)
            b_u = b_p * b_a
            b_g = (b_p * b_e[:, None] - b_t * b_u).to(b_k.dtype)
            b_u = b_u.to(b_k.dtype)
            # [2 BT, K]
            b_gu = tl.join(b_g, b_u).permute(2, 0, 1).reshape(2 * BT, BS)
            b_d = tl.dot(b_gu, b_k, b_d, input_precision="ieee")
            b_g_sum = add_row_sums(b_g, b_g_sum)
            b_u_sum = add_row_sums(b_u, b_u_sum)
    b_k_ref = tl.sum(load_tile(k, 0, i_b, i_g, i_diagonal, T, BS, K, K, True).to(tl.float32), 0) / BS
    b_dq, b_dr = tl.split(b_d.reshape(2, BT, K).permute(1, 2, 0))
    b_dq = (b_dq - tl.max(b_g_sum, 1)[:, None] * b_k_ref[None, :]) * scale
    b_dr = (b_dr - tl.max(b_u_sum, 1)[:, None] * b_k_ref[None, :]) * scale
    dq.store([i_b, i_h, i_t, 0], b_dq.to(dq.dtype).reshape(1, 1, BT, K))
    dr.store([i_b, i_h, i_t, 0], b_dr.to(dr.dtype).reshape(1, 1, BT, K))
