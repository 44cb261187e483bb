"""Batched matrix products with symmetric results, of which only the lower triangle is computed.

For 16-bit dtypes on a GPU, a Triton kernel computes the tiles on and below the diagonal and writes each to
both triangles: (t + 1) / 2t of the work of a full product with t tiles per side. Otherwise torch computes the
full product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 128
BLOCK_K = 64
NUM_WARPS = 4
NUM_STAGES = 3


@triton.jit
def _load(
    x, i_n, i_row, i_col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):
    """Load a tile of matrix i_n of a contiguous `[n, num_rows, num_cols]`, with zeros out of bounds."""
    if TMA:
        b_x = x.load([i_n, i_row, i_col]).reshape(ROWS, COLS)
    else:
        o_row = i_row + tl.arange(0, ROWS)[:, None]
        o_col = i_col + tl.arange(0, COLS)[None, :]
        p_x = x + (tl.cast(i_n, tl.int64) * num_rows + o_row) * num_cols + o_col
        b_x = tl.load(p_x, mask=(o_row < num_rows) & (o_col < num_cols), other=0.0)
    return b_x


@triton.jit
def _store(x, b_x, i_n, i_row, i_col, m, BM: tl.constexpr, TMA: tl.constexpr):
    """Store a tile of matrix i_n of a contiguous `[n, m, m]`."""
    if TMA:
        x.store([i_n, i_row, i_col], b_x.reshape(1, BM, BM))
    else:
        o_row = i_row + tl.arange(0, BM)[:, None]
        o_col = i_col + tl.arange(0, BM)[None, :]
        p_x = x + (tl.cast(i_n, tl.int64) * m + o_row) * m + o_col
        tl.store(p_x, b_x, mask=(o_row < m) & (o_col < m))


@triton.jit(do_not_specialize=["alpha", "beta", "diagonal"])
def _symmetric_product_kernel(
    a, b, c, out, alpha, beta, diagonal, n, m, k, num_pairs,
    TALL: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute one tile of alpha a b^T + beta c + diagonal I per program, on or below the diagonal."""
    dtype: tl.constexpr = a.dtype.element_ty
    if TMA:
        # made on the device: on the host this takes longer than the product of a few matrices
        if TALL:
            a = tl.make_tensor_descriptor(a, [n, k, m], [k * m, m, 1], [1, BK, BM])
            b = tl.make_tensor_descriptor(b, [n, k, m], [k * m, m, 1], [1, BK, BM])
        else:
            a = tl.make_tensor_descriptor(a, [n, m, k], [m * k, k, 1], [1, BM, BK])
            b = tl.make_tensor_descriptor(b, [n, m, k], [m * k, k, 1], [1, BM, BK])
        c = tl.make_tensor_descriptor(c, [n, m, m], [m * m, m, 1], [1, BM, BM])
        out = tl.make_tensor_descriptor(out, [n, m, m], [m * m, m, 1], [1, BM, BM])
    i_n = tl.program_id(0) // num_pairs
    i_pair = tl.program_id(0) % num_pairs
    # tile pairs in the order (0, 0), (1, 0), (1, 1), (2, 0), ...
    i_row = tl.cast((tl.sqrt(8.0 * i_pair + 1.0) - 1.0) * 0.5, tl.int32)
    i_row = tl.where(i_row * (i_row + 1) // 2 > i_pair, i_row - 1, i_row)
    i_row = tl.where((i_row + 1) * (i_row + 2) // 2 <= i_pair, i_row + 1, i_row)
    i_col = i_pair - i_row * (i_row + 1) // 2

    b_acc = tl.zeros([BM, BM], tl.float32)
    for i_k in range(0, k, BK):
        if TALL:
            # [BK, BM]
            b_a = tl.trans(_load(a, i_n, i_k, i_row * BM, k, m, BK, BM, TMA))
            b_b = _load(b, i_n, i_k, i_col * BM, k, m, BK, BM, TMA)
        else:
            # [BM, BK]
            b_a = _load(a, i_n, i_row * BM, i_k, m, k, BM, BK, TMA)
            b_b = tl.trans(_load(b, i_n, i_col * BM, i_k, m, k, BM, BK, TMA))
        b_acc = tl.dot(b_a, b_b, b_acc)

    b_acc *= alpha
    if ADD:
        b_acc += beta * _load(c, i_n, i_row * BM, i_col * BM, m, m, BM, BM, TMA).to(tl.float32)
    if i_row == i_col:
        o_m = tl.arange(0, BM)
        b_acc += tl.where(o_m[:, None] == o_m[None, :], diagonal, 0.0)
    # [BM, BM]
    b_out = b_acc.to(dtype)
    _store(out, b_out, i_n, i_row * BM, i_col * BM, m, BM, TMA)
    if i_row != i_col:
        _store(out, tl.trans(b_out), i_n, i_col * BM, i_row * BM, m, BM, TMA)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    *,
    is_tall: bool = False,
    alpha: float = 1.0,
    c: Tensor | None = None,
    beta: float = 1.0,
    diagonal: float = 0.0,
) -> Tensor:
    """Compute alpha a b^T + beta c + diagonal I for a batch whose results are symmetric.

    They are if b is a, or if a and b are polynomials of one symmetric matrix. On a GPU the upper triangle is
    a copy of the lower one. 16-bit inputs accumulate in fp32.

    Args:
        a: `[n, m, k]`, or `[n, k, m]` if tall; any floating dtype.
        b: Same shape and dtype as a.
        is_tall: Whether to compute a^T b instead of a b^T.
        alpha: Factor of the product.
        c: Symmetric `[n, m, m]` in the dtype of a, or None.
        beta: Factor of c.
        diagonal: Added to the diagonal.

    Returns:
        `[n, m, m]` in the dtype of a.
    """
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return launch(a, b, c, is_tall, alpha, beta, diagonal)
    left, right = (a.mT, b) if is_tall else (a, b.mT)
    if c is None:
        out = torch.bmm(left, right).mul_(alpha)
    else:
        out = torch.baddbmm(c, left, right, beta=beta, alpha=alpha)
    out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


def launch(
    a: Tensor, b: Tensor, c: Tensor | None, is_tall: bool, alpha: float, beta: float, diagonal: float
) -> Tensor:
    """Launch the kernel of `symmetric_product`; same arguments and result."""
    a, b = a.contiguous(), b.contiguous()
    n, m, k = (a.shape[0], a.shape[2], a.shape[1]) if is_tall else a.shape
    out = torch.empty(n, m, m, dtype=a.dtype, device=a.device)
    addend = out if c is None else c.contiguous()
    num_tiles = triton.cdiv(m, BLOCK_M)
    num_pairs = num_tiles * (num_tiles + 1) // 2
    if a.numel() == 0:
        return out.zero_()
    is_hopper = a.is_cuda and torch.cuda.get_device_capability(a.device) >= (9, 0)
    # TMA requires row strides that are multiples of 16 bytes
    use_tma = is_hopper and m % 8 == 0 and k % 8 == 0
    if use_tma:
        triton.set_allocator(_scratch)
    with torch.cuda.device_of(a):
        _symmetric_product_kernel[(n * num_pairs,)](
            a, b, addend, out, alpha, beta, diagonal, n, m, k, num_pairs,
            TALL=is_tall, ADD=c is not None, BM=BLOCK_M, BK=BLOCK_K, TMA=use_tma,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return out


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Allocate memory for the descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
