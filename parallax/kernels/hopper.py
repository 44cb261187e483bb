"""What the Hopper kernels share: warps that take different parts, in Gluon.

A program has one warp that copies tiles into a ring in shared memory, and two warpgroups that multiply. A
stage of the ring is `full` when its copies have arrived and `empty` when both warpgroups have let it go;
the n-th use of a barrier is waited for by n's parity.

A program that does many items draws them from a counter in memory. The warp that copies draws, ahead of the
others, and tells them through two slots in shared memory, `items`: (slots, slot_full, slot_empty).
"""

from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from parallax.kernels.addressing import descriptor_block

ROWS = tl.constexpr(64)
"""Rows of a warpgroup; a program has twice as many."""

CONSUMER_REGISTERS = tl.constexpr(240)
"""Registers of a thread that multiplies; with those below, all that a multiprocessor has."""

PRODUCER_REGISTERS = tl.constexpr(24)
"""Registers of a thread that copies."""

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def num_multiprocessors(device: torch.device) -> int:
    """Return how many the GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def draw_items(num_items: int, device: torch.device) -> tuple[int, Tensor]:
    """Return the number of programs, one a multiprocessor, and the counter from which they draw.

    The first items are the longest, and each goes to the program that is free first. Who draws which changes
    no result.
    """
    return min(num_items, num_multiprocessors(device)), torch.zeros(1, dtype=torch.int32, device=device)


@gluon.jit
def new_barriers(NUM: tl.constexpr, COUNT: tl.constexpr):
    """Return barriers [NUM, 1] that COUNT arrivals complete."""
    barriers = gl.allocate_shared_memory(tl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def new_items():
    """Return the slots of `announce_item`, and the barriers that they need."""
    slots = gl.allocate_shared_memory(tl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return slots, new_barriers(2, 1), new_barriers(2, 2)


@gluon.jit
def announce_item(items, i_n, i_item):
    """Tell the warpgroups this program's n-th item, as soon as both have read the one two before."""
    slots, slot_full, slot_empty = items
    mbarrier.wait(slot_empty.index(i_n % 2), (i_n // 2 & 1) ^ 1)
    slots.index(i_n % 2).store(gl.full([1], i_item, tl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(slot_full.index(i_n % 2), count=1)


@gluon.jit
def learn_item(items, i_n):
    """Return this program's n-th item, in a warpgroup."""
    slots, slot_full, slot_empty = items
    mbarrier.wait(slot_full.index(i_n % 2), i_n // 2 & 1)
    i_item = gl.max(slots.index(i_n % 2).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(slot_empty.index(i_n % 2), count=1)
    return i_item


@cache
def _layout(num_rows: int, block_k: int, dtype: torch.dtype) -> Any:
    """Return how a tile lies in shared memory; to work it out takes longer than the rest of a descriptor."""
    return gl.NVMMASharedLayout.get_default_for([num_rows, block_k], _DTYPES[dtype])


def describe(x: Tensor, num_rows: int, block_k: int) -> TensorDescriptor:
    """Return the descriptor that copies `num_rows` rows of one head of `[B, T, H, K]`, 16 bits a number."""
    block = descriptor_block(x, num_rows, block_k)
    return TensorDescriptor(x, *block, _layout(num_rows, block_k, x.dtype))
