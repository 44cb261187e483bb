"""Barriers, work queue and descriptors of the warp-specialized Hopper kernels, in Gluon.

Warp specialization. A program has one producer warp, which copies tiles by TMA into a ring buffer in shared
memory, and two consumer warpgroups, which compute the products. A stage of the ring is `full` when its copies
have arrived and `empty` when both consumers have released it; the n-th use of a barrier is awaited with the
parity of n.

Work queue. Kernels are persistent: each program takes work tiles from a counter in global memory until none
is left. The producer fetches them ahead of the consumers and publishes them through two slots in shared
memory, `tile_slots`: (slots, slot_full, slot_empty).
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
"""Rows of a consumer warpgroup; a program has two."""

CONSUMER_REGISTERS = tl.constexpr(240)
"""Registers of a consumer thread; together with the producer's they fill the register file."""

PRODUCER_REGISTERS = tl.constexpr(24)
"""Registers of a producer thread."""

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def num_multiprocessors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def make_work_queue(num_work_tiles: int, device: torch.device) -> tuple[int, Tensor]:
    """Return the number of programs, at most one per multiprocessor, and the queue's counter, zero.

    The longest work tiles come first, and each goes to the first idle program. The assignment does not affect
    the result.
    """
    return min(num_work_tiles, num_multiprocessors(device)), torch.zeros(1, dtype=torch.int32, device=device)


@gluon.jit
def new_barriers(NUM: tl.constexpr, COUNT: tl.constexpr):
    """Allocate barriers [NUM, 1], each completed by COUNT arrivals."""
    barriers = gl.allocate_shared_memory(tl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def new_tile_slots():
    """Allocate the slots of `publish_work_tile` and their barriers."""
    slots = gl.allocate_shared_memory(tl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return slots, new_barriers(2, 1), new_barriers(2, 2)


@gluon.jit
def publish_work_tile(tile_slots, i_n, i_work_tile):
    """Publish this program's n-th work tile to the consumers once both have read the (n - 2)-th."""
    slots, slot_full, slot_empty = tile_slots
    mbarrier.wait(slot_empty.index(i_n % 2), (i_n // 2 & 1) ^ 1)
    slots.index(i_n % 2).store(gl.full([1], i_work_tile, tl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(slot_full.index(i_n % 2), count=1)


@gluon.jit
def receive_work_tile(tile_slots, i_n):
    """Return this program's n-th work tile, in a consumer warpgroup."""
    slots, slot_full, slot_empty = tile_slots
    mbarrier.wait(slot_full.index(i_n % 2), i_n // 2 & 1)
    i_work_tile = gl.max(slots.index(i_n % 2).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(slot_empty.index(i_n % 2), count=1)
    return i_work_tile


@cache
def _layout(num_rows: int, block_k: int, dtype: torch.dtype) -> Any:
    """Return the shared-memory layout of a tile; cached, as it takes most of the time of a descriptor."""
    return gl.NVMMASharedLayout.get_default_for([num_rows, block_k], _DTYPES[dtype])


def describe(x: Tensor, num_rows: int, block_k: int) -> TensorDescriptor:
    """Return the descriptor that copies `num_rows` rows of one head of `[B, T, H, K]`, bf16/fp16."""
    block = descriptor_block(x, num_rows, block_k)
    return TensorDescriptor(x, *block, _layout(num_rows, block_k, x.dtype))
