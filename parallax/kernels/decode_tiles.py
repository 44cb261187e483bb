"""Splits of the KV cache and tile sizes of the decode kernels, by call size and device."""

from typing import Any, NamedTuple

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Allowed numbers of splits: divisors of common lengths, which leave no tile nearly empty."""

FAST_MEMORY_BYTES = 100 << 30
"""Devices with more memory than this have HBM3e or later.

An H100 and an H200 have the same compute capability and as many multiprocessors, but 3.35 and 4.8 TB/s.
The cards with HBM3 have 80 to 96 GB (H100, H100 NVL, GH200), those with HBM3e 141 GB and more (H200, GH200,
B200).
"""

LARGE_SHARED_BYTES = 160 << 10
"""Shared memory per program from which four tiles fit: 163 KB on an A100, 227 KB from Hopper on, but 99 KB on
GPUs of compute capability 8.6, 8.9 and 12."""


class DecodeDevice(NamedTuple):
    """Device properties that determine the tile.

    Attributes:
        num_multiprocessors: Number of streaming multiprocessors.
        has_fast_memory: Whether the memory is HBM3e or later.
        has_large_shared_memory: Whether a program may have LARGE_SHARED_BYTES.
    """

    num_multiprocessors: int
    has_fast_memory: bool
    has_large_shared_memory: bool = True

    @classmethod
    def of(cls, properties: Any) -> "DecodeDevice":
        """Convert from `torch.cuda.get_device_properties`."""
        is_large = properties.shared_memory_per_block_optin >= LARGE_SHARED_BYTES
        # the memory of small GPUs is slow, however large
        is_fast = is_large and properties.total_memory > FAST_MEMORY_BYTES
        return cls(properties.multi_processor_count, is_fast, is_large)


class DecodeTile(NamedTuple):
    """Splits and tile of a call.

    Attributes:
        num_splits: Splits along the cache.
        block_s: Keys in a tile.
        num_warps: Warps per program.
        num_stages: Depth of the load pipeline.
    """

    num_splits: int
    block_s: int
    num_warps: int
    num_stages: int


def tile_of(num_pairs: int, capacity: int, num_rows: int, head_dim: int, device: DecodeDevice) -> DecodeTile:
    """Return splits and tile of a call, from its shape and the device, never from the sequences' lengths.

    Measured by `benchmarks/tune_decode.py`: on an H200 with these kernels, on an H100 with earlier ones that
    had queries and probes in separate tiles.

    Args:
        num_pairs: Batch times kv heads.
        capacity: Maximum number of keys that a query sees.
        num_rows: New tokens times query heads per kv head.
        head_dim: Head width K.
        device: Device that runs the call.
    """
    num_splits = _num_splits(num_pairs, capacity, device)
    if num_rows > 16:
        # many rows take up the registers
        return DecodeTile(num_splits, 32, 8 if num_rows > 64 else 4, 3)
    num_programs, keys = num_pairs * num_splits, capacity / num_splits
    is_alone = num_programs <= device.num_multiprocessors
    # the same bytes in flight for all head widths
    width = 128 // head_dim
    if not device.has_fast_memory:
        # a program that is alone on its multiprocessor keeps one more tile in flight, if there is room
        num_stages = 4 if is_alone and device.has_large_shared_memory else 3
        return DecodeTile(num_splits, 64 * width, 4, num_stages)
    if num_rows > 8:
        # probes in a separate tile: twice the registers
        return DecodeTile(num_splits, 64 * width, 4, 5 if is_alone else 3)
    num_rounds = -(-num_programs // device.num_multiprocessors)
    is_full = num_programs > 0.9 * num_rounds * device.num_multiprocessors
    if (is_alone and (keys >= 512 or 64 < keys == capacity)) or (is_full and keys >= 4096 and width == 1):
        # one program per multiprocessor at a time; large tiles, whose overhead per byte is small
        return DecodeTile(num_splits, 128 * width, 4, 3)
    if is_alone:
        # so much shared memory that no two programs share a multiprocessor, nor one with the next call's
        return DecodeTile(num_splits, 64 * width, 4, 5)
    return DecodeTile(num_splits, 32 * width, 2, 4)


def _num_splits(num_pairs: int, capacity: int, device: DecodeDevice) -> int:
    """Return the number of splits that minimizes the time of a cost model.

    Two programs run on a multiprocessor. One program on each of 96% of an H200's multiprocessors, or 70% of
    an H100's, saturates the memory bandwidth; fewer reach a proportional part. Splitting costs 5%, plus the
    time in which every multiprocessor reads 64 keys.
    """
    num_multiprocessors = device.num_multiprocessors
    num_saturating = (0.96 if device.has_fast_memory else 0.7) * num_multiprocessors

    def cost(num_splits: int) -> float:
        num_full, num_last = divmod(num_pairs * num_splits, 2 * num_multiprocessors)
        programs = 2 * num_full * num_multiprocessors + max(num_last, num_saturating * (num_last > 0))
        keys = programs * capacity / num_splits
        return keys if num_splits == 1 else 1.05 * keys + 64 * num_multiprocessors

    return min([n for n in SPLITS if n == 1 or n * 64 <= capacity], key=cost)
