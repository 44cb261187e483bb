"""Tile sizes of the kernels, by head width, dtype and GPU generation, and the inputs that they support.

Measured by benchmarks/tune_attention.py (benchmarks/results/tune_attention_h100_202611.json); those of the
warp-specialized kernels are from benchmarks/results/hopper_log_202611.md.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KernelName = Literal["forward", "dqdr", "dkdv", "softmax_forward", "softmax_dq", "softmax_dkdv"]

_WITH_PROBES: dict[KernelName, KernelName] = {
    "softmax_forward": "forward",
    "softmax_dq": "dqdr",
    "softmax_dkdv": "dkdv",
}
"""Softmax kernel -> Parallax kernel, whose tile it uses where none was measured: it needs less memory."""

HEAD_DIMS = (8, 16, 32, 64, 96, 128, 256)
"""Supported head widths; those below 64 by the plain kernels."""

_MIN_COLUMNS = 16  # of an operand of a product

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Supported dtypes."""


class Tile(NamedTuple):
    """Tile sizes and launch options of one kernel.

    Attributes:
        block_t: Query rows in a tile.
        block_s: Keys in a tile.
        num_warps: Warps per program.
        num_stages: Depth of the load pipeline.
        in_registers: Number of loop-invariant operands that are kept in registers: of queries and probes in
            the forward, queries and dO for dQ (and dR), keys and values for dK and dV.
        sums: Columns of the row sums, which select their method in `row_sums`: 1, 4 or 8.
        is_specialized: Whether the tile is for the warp-specialized kernel (`hopper_*.py`).
        key_norms: Whether bf16 scores are bounded by key norms, computed in a pass over the keys, so that
            most tiles need no maxima (`hopper_forward`).
        use_descriptors: Whether TMA descriptors load the operands wherever they can.
    """

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    in_registers: int = 0
    sums: int = 8
    is_specialized: bool = False
    key_norms: bool = False
    use_descriptors: bool = True


_HOPPER: dict[tuple[KernelName, int], Tile] = {
    ("forward", 64): Tile(64, 64, 4, 3),
    ("forward", 128): Tile(64, 64, 4, 2),
    ("forward", 256): Tile(64, 32, 8, 2, sums=4),
    ("dqdr", 64): Tile(64, 64, 4, 3, 2),
    ("dqdr", 128): Tile(64, 64, 4, 2, sums=4),
    ("dqdr", 256): Tile(64, 32, 8, 2, sums=4),
    ("dkdv", 64): Tile(64, 64, 4, 3),
    ("dkdv", 128): Tile(32, 64, 4, 3, 1),
    ("dkdv", 256): Tile(32, 64, 8, 2),
}

_HOPPER_NARROW: dict[KernelName, Tile] = {
    "forward": Tile(64, 64, 4, 3),
    "dqdr": Tile(64, 32, 4, 1, sums=4),
    "dkdv": Tile(32, 64, 4, 1, use_descriptors=False),
}
"""Takes precedence for widths below 64; measured at 8 alone, with rows of 127 tokens."""

_HOPPER_SPECIALIZED: dict[tuple[KernelName, int], Tile] = {
    ("forward", 64): Tile(128, 128, 4, 3, sums=4, is_specialized=True, key_norms=True),
    ("forward", 128): Tile(128, 64, 4, 3, sums=4, is_specialized=True, key_norms=True),
    ("dqdr", 64): Tile(128, 64, 4, 4, 1, sums=4, is_specialized=True),
    ("dkdv", 64): Tile(64, 128, 4, 4, 1, is_specialized=True),
    ("dkdv", 128): Tile(32, 128, 4, 4, 1, is_specialized=True),
    ("softmax_forward", 64): Tile(128, 64, 4, 7, sums=4, is_specialized=True, key_norms=True),
    ("softmax_forward", 128): Tile(128, 64, 4, 5, sums=4, is_specialized=True, key_norms=True),
    ("softmax_dq", 64): Tile(128, 64, 4, 4, 2, sums=4, is_specialized=True),
    ("softmax_dq", 128): Tile(128, 64, 4, 4, 2, sums=4, is_specialized=True),
    ("softmax_dkdv", 64): Tile(64, 128, 4, 4, 1, is_specialized=True),
    ("softmax_dkdv", 128): Tile(64, 128, 4, 3, is_specialized=True),
}
"""Takes precedence over `_HOPPER` on Hopper itself, for inputs that TMA descriptors can read."""

_HOPPER_SHORT: dict[tuple[KernelName, int], Tile] = {
    ("forward", 64): Tile(128, 64, 4, 4, sums=4, is_specialized=True),
    ("forward", 128): Tile(128, 64, 4, 3, sums=4, is_specialized=True),
    ("softmax_forward", 64): Tile(128, 128, 4, 3, sums=4, is_specialized=True),
    ("softmax_forward", 128): Tile(128, 64, 4, 5, sums=4, is_specialized=True),
}
"""Takes precedence over `_HOPPER_SPECIALIZED` for documents or windows of at most `SHORT` mean tokens."""

SHORT = 1024

_AMPERE: dict[tuple[KernelName, int], Tile] = {
    ("forward", 64): Tile(64, 64, 4, 2),
    ("forward", 128): Tile(64, 32, 4, 2),
    ("forward", 256): Tile(64, 32, 8, 1, sums=1),
    ("dqdr", 64): Tile(64, 64, 4, 2),
    ("dqdr", 128): Tile(64, 32, 8, 2),
    ("dqdr", 256): Tile(32, 32, 8, 1, sums=1),
    ("dkdv", 64): Tile(32, 64, 4, 2),
    ("dkdv", 128): Tile(32, 64, 8, 2),
    ("dkdv", 256): Tile(32, 32, 8, 1),
}

_FP32: dict[tuple[KernelName, int], Tile] = {
    ("forward", 64): Tile(32, 32, 4, 1, sums=1),
    ("forward", 128): Tile(32, 32, 8, 1, sums=1),
    ("forward", 256): Tile(16, 32, 8, 1, sums=1),
    ("dqdr", 64): Tile(32, 32, 8, 1, sums=1),
    ("dqdr", 128): Tile(16, 32, 8, 1, sums=1),
    ("dqdr", 256): Tile(16, 16, 8, 1, sums=1),
    ("dkdv", 64): Tile(32, 32, 8, 1),
    ("dkdv", 128): Tile(32, 16, 8, 1),
    ("dkdv", 256): Tile(16, 16, 8, 1),
}
"""Not tuned: tiles that spill few registers or none up to width 128."""

_FP32_HOPPER = _FP32 | {
    ("forward", 64): Tile(64, 32, 4, 1, sums=1),
    ("dqdr", 64): Tile(64, 32, 8, 1, sums=1),
    ("dkdv", 64): Tile(32, 64, 8, 1),
}
"""Not tuned: 64 rows, the minimum for warpgroup products, at the width where they fit in registers."""


def num_columns(head_dim: int) -> int:
    """Return the columns of a tile of heads of a width: a power of two, the rest zeros."""
    return max(_MIN_COLUMNS, 1 << (head_dim - 1).bit_length())


def tile_of(kernel: KernelName, x: Tensor, use_descriptors: bool, reach: int) -> Tile:
    """Return the tile of a kernel for inputs like x.

    Args:
        kernel: Name of the kernel.
        x: Queries or keys `[B, T, H, K]`, on the device that runs the kernel.
        use_descriptors: Whether TMA descriptors load the operands; the warp-specialized kernels need them.
        reach: Tokens that a program streams, from `addressing.Mask.reach`.
    """
    width = 64 if x.shape[3] <= 64 else 128 if x.shape[3] <= 128 else 256
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else (0, 0)
    plain = _WITH_PROBES.get(kernel, kernel)
    if x.dtype == torch.float32:
        return (_FP32_HOPPER if capability[0] == 9 else _FP32)[plain, width]
    if capability[0] == 9 and x.shape[3] < 64:
        return _HOPPER_NARROW[plain]
    specialized = _HOPPER_SPECIALIZED | (_HOPPER_SHORT if reach <= SHORT else {})
    if capability[0] == 9 and use_descriptors and (kernel, width) in specialized:
        return specialized[kernel, width]
    return (_HOPPER if capability >= (9, 0) else _AMPERE)[plain, width]


def refusal(q: Tensor, scale: float) -> str | None:
    """Return why the kernels do not support these inputs, or None if they do.

    Args:
        q: Queries `[B, T, H, K]`.
        scale: Factor of q.k.
    """
    if not scale > 0:
        return f"needs a positive scale, got {scale}"
    if q.device.type != "cuda":
        return f"needs CUDA, got {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0"
    if q.dtype not in DTYPES:
        return f"serves bfloat16, float16 and float32, got {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"serves the head widths {', '.join(map(str, HEAD_DIMS))}, got {q.shape[3]}"
    return None
