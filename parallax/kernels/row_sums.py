"""Rounding of a tile to 16 bits, and sums over its rows as it was rounded.

Three ways, told apart by the number of columns in which the sums are kept, since no way is the fastest for
every kernel (`benchmarks/tune_attention.py`):

    1   additions; nothing but Triton's own operations, so for any dtype
    8   a product with ones: the tensor cores write every sum into each of eight columns
    4   additions in PTX: each thread adds what it holds of a row, so that four columns hold a part of the sum
        each. Two numbers are rounded by one instruction. Triton's own conversion takes an instruction a
        number, of a unit with a sixteenth of the throughput, as soon as more than a product reads the
        result; and the additions run while the tensor cores multiply the tile. They read registers that
        the product still reads: ptxas moves nothing into these before it ends.
"""

import triton
import triton.language as tl

ADDED = tl.constexpr(4)
"""Columns of sums that each thread adds up."""


@triton.jit
def round_tile(b_x, dtype: tl.constexpr, COLUMNS: tl.constexpr):
    """Round a tile [ROWS, BS] fp32 whose rows are to be summed in so many columns."""
    if COLUMNS != ADDED:
        b_x = b_x.to(dtype)
    elif dtype == tl.bfloat16:
        b_x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [b_x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        tl.static_assert(dtype == tl.float16, "sums in four columns are for 16 bits")
        b_x = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [b_x], dtype=tl.float16, is_pure=True, pack=2
        )
    return b_x


@triton.jit
def added_row_sums(b_x):
    """Return the sums of a tile's rows [ROWS, BS] 16 bits in four columns, [ROWS, ADDED] fp32."""
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
    # a thread holds two neighbours of every eight columns of a product
    b_sum = tl.reshape(b_sum, [b_x.shape[0], b_x.shape[1] // 8, 4, 2])
    return tl.sum(tl.sum(b_sum, 3), 1)


@triton.jit
def add_row_sums(b_x, b_sum):
    """Add the row sums of a tile, rounded by `round_tile`, to b_sum [ROWS, COLUMNS] fp32."""
    if b_sum.shape[1] == 1:
        b_sum += tl.sum(b_x.to(tl.float32), 1)[:, None]
    elif b_sum.shape[1] == ADDED:
        b_sum += added_row_sums(b_x)
    else:
        b_ones = tl.full([b_x.shape[1], b_sum.shape[1]], 1.0, b_x.dtype)
        b_sum = tl.dot(b_x, b_ones, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def total_row_sums(b_sum):
    """Return the sums [ROWS] of `add_row_sums`."""
    # eight columns are equal
    return tl.sum(b_sum, 1) if b_sum.shape[1] == ADDED else tl.max(b_sum, 1)
