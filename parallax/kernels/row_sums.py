"""Rounding of a tile to 16 bits, and row sums of the rounded tile.

The sums are d1 and d2 of (6) and those of G and U in (13) of `parallax.reference`. There are three methods,
selected by the number of columns that hold the sums, as none is fastest in every kernel
(`benchmarks/tune_attention.py`):

    1   additions in Triton, for any dtype
    8   a product with ones: the tensor cores write the sum into each of eight columns
    4   additions in PTX: each thread adds its elements of a row, so that four columns hold partial sums. One
        instruction rounds two numbers; Triton's own conversion takes one instruction per number, on a unit
        with a sixteenth of the throughput, unless only a product reads the result. The additions run while
        the tensor cores multiply the tile, and read the registers that the product reads: ptxas does not
        reuse these before the product ends.
"""

import triton
import triton.language as tl

PTX_COLUMNS = tl.constexpr(4)
"""Columns of row sums that are added in PTX."""


@triton.jit
def round_tile(b_x, dtype: tl.constexpr, COLUMNS: tl.constexpr):
    """Round a tile [ROWS, BS] fp32 to dtype, by the method of row sums in COLUMNS columns."""
    if COLUMNS != PTX_COLUMNS:
        b_x = b_x.to(dtype)
    elif dtype == tl.bfloat16:
        b_x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [b_x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        tl.static_assert(dtype == tl.float16, "row sums in four columns need 16 bits")
        b_x = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [b_x], dtype=tl.float16, is_pure=True, pack=2
        )
    return b_x


@triton.jit
def ptx_row_sums(b_x):
    """Return the row sums of a 16-bit tile [ROWS, BS] in four columns, [ROWS, PTX_COLUMNS] fp32."""
    if b_x.dtype == tl.bfloat16:
        b_sum = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=&r,=r,r", [b_x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        b_sum = tl.inline_asm_elementwise(
            "{.reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;}",
            "=f,=f,r", [b_x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    # a thread holds two adjacent columns of every eight of a product
    b_sum = tl.reshape(b_sum, [b_x.shape[0], b_x.shape[1] // 8, 4, 2])
    return tl.sum(tl.sum(b_sum, 3), 1)


@triton.jit
def add_row_sums(b_x, b_sum):
    """Add the row sums of a tile, rounded by `round_tile`, to b_sum [ROWS, COLUMNS] fp32."""
    if b_sum.shape[1] == 1:
        b_sum += tl.sum(b_x.to(tl.float32), 1)[:, None]
    elif b_sum.shape[1] == PTX_COLUMNS:
        b_sum += ptx_row_sums(b_x)
    else:
        b_ones = tl.full([b_x.shape[1], b_sum.shape[1]], 1.0, b_x.dtype)
        b_sum = tl.dot(b_x, b_ones, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def total_row_sums(b_sum):
    """Return the sums [ROWS] of `add_row_sums`."""
    # all eight columns are equal
    return tl.sum(b_sum, 1) if b_sum.shape[1] == PTX_COLUMNS else tl.max(b_sum, 1)
