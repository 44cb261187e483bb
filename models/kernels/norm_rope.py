"""RMSNorm of heads with RoPE as custom operators: each way one Triton kernel, one pass over memory.

The same in PyTorch is `rope(norm(x))` with nn.RMSNorm and models.attention.base.Rope. In both, with x the
left and the right half of a head, g the gain and (c, s) the cosines and sines of the token's position:

    u = x / sqrt(mean(x^2) + eps),  n = g u,  y = (n_left c - n_right s, n_right c + n_left s)

and backward, for the gradient dy:

    dn = (dy_left c + dy_right s, dy_right c - dy_left s),  dg = sum dn u,
    d = g dn,  dx = (d - u mean(d u)) / sqrt(mean(x^2) + eps)

Arithmetic is in fp32 and rounds once, at the end. The backward recomputes u from x, so that nothing but x
is saved. Every program writes its part of dg, and the parts are added in a fixed order: results are
bit-identical from run to run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Supported dtypes of heads."""

MIN_TOKENS = 512
"""Below it a program per few tokens leaves a GPU idle: torch's kernels, one program per head, are faster."""

_TILE_PAIRS = 1024
"""Rotated pairs (i, i + K/2) of a tile: of the tokens of a program, one head at a time."""

_NUM_WARPS = 4


@triton.jit
def _tokens(T, N, BT: tl.constexpr):
    """Return a program's tokens [BT], which of them exist, and their rows and columns in `[B, T]`."""
    o_n = tl.program_id(0) * BT + tl.arange(0, BT)
    return o_n, o_n < N, (o_n // T).to(tl.int64), (o_n % T).to(tl.int64)


@triton.jit
def _load_halves(p_x, m_x, HALF: tl.constexpr):
    """Load the left and right halves [BT, BP] of a head of each token, fp32."""
    b_left = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    return b_left, tl.load(p_x + HALF, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def _inverse_norms(b_left, b_right, eps, HALF: tl.constexpr):
    """Return 1 / sqrt(mean(x^2) + eps) of each token's head, [BT, 1]."""
    b_squares = tl.sum(b_left * b_left + b_right * b_right, 1)
    return tl.rsqrt(b_squares / (2 * HALF) + eps)[:, None]


@triton.jit
def _load_angles(cos, sin, i_b, i_t, m_x, o_p, s_table, HALF: tl.constexpr):
    """Load the cosines and sines of each token, [BT, BP] fp32."""
    o_table = (i_b * s_table + i_t * HALF)[:, None] + o_p
    return tl.load(cos + o_table, mask=m_x, other=0.0), tl.load(sin + o_table, mask=m_x, other=0.0)


@triton.jit(do_not_specialize=["T", "N"])
def norm_rope_forward_kernel(
    x, gain, cos, sin, y, eps, s_b, s_t, s_h, s_table, T, N,
    H: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Compute y for all heads of BT tokens."""
    o_n, m_n, i_b, i_t = _tokens(T, N, BT)
    o_p = tl.arange(0, BP)[None, :]
    m_x = m_n[:, None] & (o_p < HALF)
    p_x = x + (i_b * s_b + i_t * s_t)[:, None] + o_p
    p_y = y + o_n.to(tl.int64)[:, None] * (H * 2 * HALF) + o_p
    b_gain_left, b_gain_right = _load_halves(gain + o_p, o_p < HALF, HALF)
    if ROTATE:
        b_cos, b_sin = _load_angles(cos, sin, i_b, i_t, m_x, o_p, s_table, HALF)
    for _ in range(H):
        b_left, b_right = _load_halves(p_x, m_x, HALF)
        b_inverse = _inverse_norms(b_left, b_right, eps, HALF)
        b_left *= b_inverse * b_gain_left
        b_right *= b_inverse * b_gain_right
        if ROTATE:
            b_left, b_right = b_left * b_cos - b_right * b_sin, b_right * b_cos + b_left * b_sin
        tl.store(p_y, b_left.to(y.dtype.element_ty), mask=m_x)
        tl.store(p_y + HALF, b_right.to(y.dtype.element_ty), mask=m_x)
        p_x += s_h
        p_y += 2 * HALF


@triton.jit(do_not_specialize=["T", "N"])
def norm_rope_backward_kernel(
    dy, x, gain, cos, sin, dx, parts, eps, s_b, s_t, s_h, s_table, T, N,
    H: tl.constexpr, HALF: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Compute dx for all heads of BT tokens, and their part of dg."""
    o_n, m_n, i_b, i_t = _tokens(T, N, BT)
    o_p = tl.arange(0, BP)[None, :]
    m_x = m_n[:, None] & (o_p < HALF)
    p_x = x + (i_b * s_b + i_t * s_t)[:, None] + o_p
    o_y = o_n.to(tl.int64)[:, None] * (H * 2 * HALF) + o_p
    p_dy, p_dx = dy + o_y, dx + o_y
    b_gain_left, b_gain_right = _load_halves(gain + o_p, o_p < HALF, HALF)
    if ROTATE:
        b_cos, b_sin = _load_angles(cos, sin, i_b, i_t, m_x, o_p, s_table, HALF)
    b_sum_left = tl.zeros([BT, BP], tl.float32)
    b_sum_right = tl.zeros([BT, BP], tl.float32)
    for _ in range(H):
        b_left, b_right = _load_halves(p_x, m_x, HALF)
        b_dleft, b_dright = _load_halves(p_dy, m_x, HALF)
        b_inverse = _inverse_norms(b_left, b_right, eps, HALF)
        b_left *= b_inverse
        b_right *= b_inverse
        if ROTATE:
            b_dleft, b_dright = b_dleft * b_cos + b_dright * b_sin, b_dright * b_cos - b_dleft * b_sin
        b_sum_left += b_dleft * b_left
        b_sum_right += b_dright * b_right
        b_dleft *= b_gain_left
        b_dright *= b_gain_right
        b_mean = (tl.sum(b_dleft * b_left + b_dright * b_right, 1) / (2 * HALF))[:, None]
        b_dleft = b_inverse * (b_dleft - b_left * b_mean)
        b_dright = b_inverse * (b_dright - b_right * b_mean)
        tl.store(p_dx, b_dleft.to(dx.dtype.element_ty), mask=m_x)
        tl.store(p_dx + HALF, b_dright.to(dx.dtype.element_ty), mask=m_x)
        p_x += s_h
        p_dy += 2 * HALF
        p_dx += 2 * HALF
    p_parts = parts + tl.program_id(0) * (2 * HALF) + tl.arange(0, BP)
    m_p = tl.arange(0, BP) < HALF
    tl.store(p_parts, tl.sum(b_sum_left, 0), mask=m_p)
    tl.store(p_parts + HALF, tl.sum(b_sum_right, 0), mask=m_p)


def _launch_options(x: Tensor, cos: Tensor | None) -> tuple[int, dict[str, Any]]:
    """Return the number of programs, and the arguments that both kernels take after eps."""
    batch, num_tokens, num_heads, width = x.shape
    block_p = int(triton.next_power_of_2(width // 2))
    block_t = max(1, _TILE_PAIRS // block_p)
    table_stride = 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)
    return -(-batch * num_tokens // block_t), {
        "s_b": x.stride(0), "s_t": x.stride(1), "s_h": x.stride(2), "s_table": table_stride,
        "T": num_tokens, "N": batch * num_tokens, "H": num_heads, "HALF": width // 2, "BP": block_p,
        "BT": block_t, "ROTATE": cos is not None, "num_warps": _NUM_WARPS,
    }  # fmt: skip


def _with_contiguous_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("models::norm_rope_forward", mutates_args=())
def norm_rope_forward(x: Tensor, gain: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """Compute y as one operator.

    Args:
        x: Heads `[B, T, H, K]`, of DTYPES, any strides; K even.
        gain: Gain of the norm `[K]`, any floating dtype.
        cos: Cosines `[1, T, 1, K/2]` or `[B, T, 1, K/2]`, fp32, contiguous; None for no RoPE.
        sin: Sines likewise.
        eps: Epsilon of the norm.

    Returns:
        `[B, T, H, K]` in x's dtype, contiguous.
    """
    x = _with_contiguous_heads(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_programs, options = _launch_options(x, cos)
    if x.numel():
        with torch.cuda.device_of(x):
            norm_rope_forward_kernel[(num_programs,)](x, gain.contiguous(), cos, sin, y, eps, **options)
    return y


@norm_rope_forward.register_fake
def _forward_fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("models::norm_rope_backward", mutates_args=())
def norm_rope_backward(
    dy: Tensor, x: Tensor, gain: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of x, and that of the gain in parts, as one operator.

    Args:
        dy: Gradient of y `[B, T, H, K]`.
        x: As given to norm_rope_forward; likewise the others.
        gain: `[K]`.
        cos: `[1, T, 1, K/2]` or `[B, T, 1, K/2]`, or None.
        sin: Likewise.
        eps: Epsilon of the norm.

    Returns:
        dx `[B, T, H, K]` in x's dtype, contiguous, and parts `[P, K]`, fp32, whose sum over P is dgain: a
        compiled caller adds them up in less time than torch's reduction, before which a semaphore is cleared.
    """
    x, dy = _with_contiguous_heads(x), dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_programs, options = _launch_options(x, cos)
    parts = torch.empty(num_programs, x.shape[-1], dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            norm_rope_backward_kernel[(num_programs,)](
                dy, x, gain.contiguous(), cos, sin, dx, parts, eps, **options
            )
    else:
        parts.zero_()
    return dx, parts


@norm_rope_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, gain: Tensor, cos: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    num_programs, _ = _launch_options(x, cos)
    return x.new_empty(x.shape), x.new_empty((num_programs, x.shape[-1]), dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, gain, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(x, gain, cos, sin)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gain, cos, sin = ctx.saved_tensors
    dx, parts = norm_rope_backward(dy, x, gain, cos, sin, ctx.eps)
    return dx, parts.sum(0).to(gain.dtype), None, None, None


norm_rope_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def serves(x: Tensor) -> bool:
    """Return whether the kernels serve heads `[B, T, H, K]`: on a GPU, of DTYPES, and of enough tokens."""
    return x.is_cuda and x.dtype in DTYPES and x.shape[0] * x.shape[1] >= MIN_TOKENS
