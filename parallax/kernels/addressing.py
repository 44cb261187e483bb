"""Tile loads and stores, masks and launch order of the forward and the backward kernels.

Masking. Query i sees the keys first_i <= j <= i, where first_i is the larger of its document's start and
i - window_size + 1; key j is seen by the queries j <= i < end_j, where end_j is the smaller of its document's
end and j + window_size. Neither bound ever decreases along the rows, so a tile's bounds follow from its first
and last row. Packed rows are tiled as one sequence: a tile may span documents, so short documents need no
padding, and the grid does not depend on the documents.

Vocabulary of the kernels: bare names are base pointers or descriptors, p_ blocks of pointers, b_ blocks in
registers, a_ left operands in registers, o_ offsets, m_ masks, i_ program and loop indices; capitals are
compile-time constants, except T, the number of tokens. BT query rows and BS keys in a tile, K head width, BK
its next power of two, H query heads, G kv heads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

DQDR_CACHE_BYTES = 2 << 20
"""Cache target of dQ and dR: smaller sections make that kernel faster (13% at T = 1024), and no other one."""


@triton.jit
def program_of(i_p, num_tiles, num_heads, heads_per_section):
    """Return the tile rank and head of a program; heads are grouped into sections that fit the L2 cache.

    Within a section rank 0 of every head comes first, so the longest tiles start first.
    """
    i_section = i_p // (heads_per_section * num_tiles)
    i_first = i_section * heads_per_section
    heads_here = tl.minimum(num_heads - i_first, heads_per_section)
    i_rest = i_p - i_first * num_tiles
    return i_rest // heads_here, i_first + i_rest % heads_here


@triton.jit
def load_tile(
    x, strides, i_b, i_h, i_t, T, ROWS: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr
):
    """Load rows i_t to i_t + ROWS of one head, [ROWS, BK]; zeros past T and past K."""
    if TMA:
        b_x = x.load([i_b, i_h, i_t, 0]).reshape(ROWS, BK)
    else:
        o_t = tl.arange(0, ROWS)
        o_k = tl.arange(0, BK)
        i_x = tl.cast(i_b, tl.int64) * strides[0] + tl.cast(i_h, tl.int64) * strides[2]
        p_x = x + i_x + tl.cast(i_t, tl.int64) * strides[1]
        # [ROWS, BK]
        p_x = p_x + o_t[:, None].to(tl.int64) * strides[1] + o_k[None, :]
        b_x = tl.load(p_x, mask=(i_t + o_t < T)[:, None] & (o_k < K)[None, :], other=0.0)
    return b_x


@triton.jit
def store_tile(x, b_x, i_b, i_h, i_t, T, H: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):
    """Store rows [ROWS, BK] from i_t on in one head of a contiguous `[B, T, H, K]`."""
    if TMA:
        x.store([i_b, i_h, i_t, 0], b_x.to(x.dtype).reshape(1, 1, b_x.shape[0], b_x.shape[1]))
    else:
        o_t = tl.arange(0, b_x.shape[0])
        o_k = tl.arange(0, b_x.shape[1])
        # a 64-bit start, 32-bit offsets in the tile
        p_x = x + (tl.cast(i_b, tl.int64) * T + i_t) * (H * K) + i_h * K
        p_x = p_x + (o_t[:, None] * (H * K) + o_k[None, :])
        tl.store(p_x, b_x.to(x.dtype.element_ty), mask=(i_t + o_t < T)[:, None] & (o_k < K)[None, :])


@triton.jit
def in_registers(b_x, BK: tl.constexpr):
    """Multiply x [ROWS, BK] by the identity, so that it stays in registers as a left operand.

    Otherwise the tensor cores read it from shared memory, whose bandwidth limits narrow tiles.
    """
    o_k = tl.arange(0, BK)
    b_one = (o_k[:, None] == o_k[None, :]).to(b_x.dtype)
    return tl.dot(b_x, b_one, input_precision="ieee").to(b_x.dtype)


@triton.jit
def first_key(first, o_t, T, window_size, PACKED: tl.constexpr, WINDOW: tl.constexpr):
    """Return first_i, the first visible key, of query rows (a block or a scalar)."""
    b_first = o_t * 0
    if PACKED:
        b_first = tl.load(first + o_t, mask=o_t < T, other=0)
    if WINDOW:
        b_first = tl.maximum(b_first, o_t - window_size + 1)
    return b_first


@triton.jit
def end_query(end, o_s, T, window_size, PACKED: tl.constexpr, WINDOW: tl.constexpr):
    """Return end_j, the end of the queries that see a key, of keys (a block or a scalar)."""
    b_end = o_s * 0 + T
    if PACKED:
        b_end = tl.load(end + o_s, mask=o_s < T, other=0)
    if WINDOW:
        # the sum would overflow for windows near 2^31
        b_end = tl.where(b_end - o_s > window_size, o_s + window_size, b_end)
    return b_end


@triton.jit
def key_bounds(
    first, i_t, T, window_size, BT: tl.constexpr, BS: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr
):
    """Return the key bounds of BT queries: the first key, and the first key and the end of unmasked tiles.

    Tiles before the unmasked ones and those on the diagonal, after them, are masked.
    """
    i_diagonal = i_t // BS * BS
    i_first = i_t * 0
    i_unmasked = i_first
    if PACKED or WINDOW:
        i_first = tl.maximum(first_key(first, i_t, T, window_size, PACKED, WINDOW), 0) // BS * BS
        i_last = first_key(first, tl.minimum(i_t + BT, T) - 1, T, window_size, PACKED, WINDOW)
        i_unmasked = tl.minimum(tl.maximum(tl.cdiv(i_last, BS) * BS, i_first), i_diagonal)
    return i_first, i_unmasked, i_diagonal


@triton.jit(do_not_specialize=["T"])
def _document_bounds_kernel(cu_seqlens, first, end, T, BLOCK: tl.constexpr):
    """Store the document's start and end for each of its rows; one program per document.

    The host does not check whether the bounds run from 0 to T. Where they do not, the first and the last
    document take the remaining rows, so that no kernel loops over uninitialized bounds.
    """
    i_start = tl.where(tl.program_id(0) == 0, 0, tl.load(cu_seqlens + tl.program_id(0)))
    is_last = tl.program_id(0) == tl.num_programs(0) - 1
    i_end = tl.where(is_last, T, tl.load(cu_seqlens + tl.program_id(0) + 1))
    for i_t in range(i_start, i_end, BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        m_t = (o_t >= 0) & (o_t < i_end) & (o_t < T)
        tl.store(first + o_t, o_t * 0 + i_start, mask=m_t)
        tl.store(end + o_t, o_t * 0 + i_end, mask=m_t)


def document_bounds(cu_seqlens: Tensor | None, num_tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the start and the end of each row's document; computed on the device, without synchronization.

    Args:
        cu_seqlens: Document bounds `[N + 1]` int32 rising from 0 to T, or None.
        num_tokens: T.

    Returns:
        Two `[T]` int32 tensors, or two None.
    """
    if cu_seqlens is None:
        return None, None
    # two tensors: slices of one would differ in alignment with T, for which kernels are specialized
    first, end = (torch.empty(num_tokens, dtype=torch.int32, device=cu_seqlens.device) for _ in range(2))
    num_documents = cu_seqlens.shape[0] - 1
    _document_bounds_kernel[(num_documents,)](cu_seqlens.contiguous(), first, end, num_tokens, BLOCK=1024)
    return first, end


class Mask(NamedTuple):
    """Which keys queries see, apart from causality.

    Attributes:
        first: Start of each row's document `[T]` int32, or None.
        end: End of each row's document `[T]` int32, or None.
        window_size: Keys that a query sees, or None.
        num_documents: Documents per row.
    """

    first: Tensor | None
    end: Tensor | None
    window_size: int | None
    num_documents: int = 1

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, num_tokens: int, window_size: int | None) -> "Mask":
        """Build the mask of rows of T tokens, with the window clipped to T keys.

        Args:
            cu_seqlens: Document bounds `[N + 1]` int32 rising from 0 to T, or None.
            num_tokens: T.
            window_size: Keys that a query sees, or None.
        """
        if window_size is not None:
            window_size = min(window_size, num_tokens)
        num_documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(*document_bounds(cu_seqlens, num_tokens), window_size, num_documents)

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed with documents."""
        return self.first is not None

    @property
    def has_window(self) -> bool:
        """Whether there is a sliding window."""
        return self.window_size is not None

    def reach(self, num_tokens: int) -> int:
        """Estimate how many tokens a program streams: a mean document, or the window if shorter."""
        mean_length = -(-num_tokens // self.num_documents)
        return mean_length if self.window_size is None else min(mean_length, self.window_size)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension, copied only if necessary."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch, token and head of `[B, T, H, K]`."""
    return x.stride(0), x.stride(1), x.stride(2)


def can_use_descriptors(*tensors: Tensor) -> bool:
    """Return whether the tensor memory accelerator (TMA, from Hopper on) can read all of these tensors."""
    device = tensors[0].device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(
        x.element_size() == 2 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 and s > 0 for s in row_strides(x))
        for x in tensors
    )


def describe(x: Tensor, num_rows: int, block_k: int) -> TensorDescriptor:
    """Return the TMA descriptor that loads `num_rows` rows of one head of `[B, T, H, K]`."""
    return TensorDescriptor(x, *descriptor_block(x, num_rows, block_k))


def descriptor_block(x: Tensor, num_rows: int, block_k: int) -> tuple[list[int], list[int], list[int]]:
    """Return shape, strides and block of a descriptor of `[B, T, H, K]`, in the order B, H, T, K."""
    batch_size, num_tokens, num_heads, head_dim = x.shape
    shape = [batch_size, num_heads, num_tokens, head_dim]
    return shape, [*row_strides(x), 1], [1, 1, num_rows, block_k]


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch, head and token, an aligned one for a dimension of size one."""
    batch_size, num_tokens, num_heads, head_dim = x.shape
    stride_b, stride_t, stride_h, _ = x.stride()
    unused = -(-head_dim // 8) * 8
    return (
        stride_b if batch_size > 1 else unused,
        stride_h if num_heads > 1 else unused,
        stride_t if num_tokens > 1 else unused,
    )


def heads_per_section(num_heads: int, group: int, bytes_per_head: int, cache_bytes: int = 25 << 20) -> int:
    """Return how many heads run concurrently so that the operands they stream fit in the L2 cache.

    The default is half of an H100's L2 cache. dQ and dR use `DQDR_CACHE_BYTES`, so that programs of all
    lengths run concurrently.

    Args:
        num_heads: Batch times heads.
        group: Heads that stream the same operands; a section holds whole groups.
        bytes_per_head: Bytes of the streamed operands of one group.
        cache_bytes: Bytes of cache to fill.
    """
    num_groups = num_heads // group
    groups = max(1, min(num_groups, cache_bytes // max(bytes_per_head, 1)))
    # sections of nearly equal size
    num_sections = -(-num_groups // groups)
    return -(-num_groups // num_sections) * group
