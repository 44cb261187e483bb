"""How a call of the decode kernels is cut: splits along the cache and tiles, per kind of device."""

from typing import Any, NamedTuple

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of splits to choose from: with those that divide usual lengths no tile is nearly empty."""

FAST_MEMORY_BYTES = 100 << 30
"""More memory than this is HBM3e or later.

An H100 and an H200 have the same compute capability and as many multiprocessors, but 3.35 and 4.8 TB/s.
The cards with HBM3 have 80 to 96 GB (H100, H100 NVL, GH200), those with HBM3e 141 GB and more (H200, GH200,
B200).
"""


class DecodeDevice(NamedTuple):
    """What the choice depends on.

    Attributes:
        num_multiprocessors: Of the device.
        has_fast_memory: Whether it is HBM3e or later.
    """

    num_multiprocessors: int
    has_fast_memory: bool

    @classmethod
    def of(cls, properties: Any) -> "DecodeDevice":
        """Read it off `torch.cuda.get_device_properties`."""
        return cls(properties.multi_processor_count, properties.total_memory > FAST_MEMORY_BYTES)


class DecodeTile(NamedTuple):
    """How a call is cut.

    Attributes:
        num_splits: Splits along the cache.
        block_s: Keys in a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
    """

    num_splits: int
    block_s: int
    num_warps: int
    num_stages: int


def tile_of(num_pairs: int, capacity: int, num_rows: int, head_dim: int, device: DecodeDevice) -> DecodeTile:
    """Return how a call is cut: by its size and the device's, never by the sequences' lengths.

    From what `benchmarks/tune_decode.py` measured: on an H200 these kernels, on an H100 earlier ones
    that had queries and probes in tiles of their own.

    Args:
        num_pairs: Batch times kv heads.
        capacity: Keys that a query can see at most.
        num_rows: New tokens times query heads of a kv head.
        head_dim: Head width K.
        device: Where it runs.
    """
    num_splits = _num_splits(num_pairs, capacity, device)
    if num_rows > 16:
        # many rows need the registers themselves
        return DecodeTile(num_splits, 32, 8 if num_rows > 64 else 4, 3)
    num_programs, keys = num_pairs * num_splits, capacity / num_splits
    is_alone = num_programs <= device.num_multiprocessors
    # as many bytes in flight for narrow heads as for wide ones
    width = 128 // head_dim
    if not device.has_fast_memory:
        # a program that has its multiprocessor to itself keeps one tile more in flight
        return DecodeTile(num_splits, 64 * width, 4, 4 if is_alone else 3)
    if num_rows > 8:
        # probes in a tile of their own: twice the registers
        return DecodeTile(num_splits, 64 * width, 4, 5 if is_alone else 3)
    num_rounds = -(-num_programs // device.num_multiprocessors)
    is_full = num_programs > 0.9 * num_rounds * device.num_multiprocessors
    if (is_alone and (keys >= 512 or 64 < keys == capacity)) or (is_full and keys >= 4096 and width == 1):
        # one program a multiprocessor at a time, whose tiles cost little beside their bytes
        return DecodeTile(num_splits, 128 * width, 4, 3)
    if is_alone:
        # takes so much room that no two share a multiprocessor, also with the next call's programs
        return DecodeTile(num_splits, 64 * width, 4, 5)
    return DecodeTile(num_splits, 32 * width, 2, 4)


def _num_splits(num_pairs: int, capacity: int, device: DecodeDevice) -> int:
    """Return the number of splits whose programs are done first, by a model.

    Two programs run on a multiprocessor. So many of the multiprocessors with one program each read as fast as
    memory allows: 0.96 of an H200's, 0.7 of an H100's; fewer in proportion. Splits cost 5%, and the
    time of reading 64 keys by every multiprocessor.
    """
    num_multiprocessors = device.num_multiprocessors
    enough = (0.96 if device.has_fast_memory else 0.7) * num_multiprocessors

    def cost(num_splits: int) -> float:
        num_full, num_last = divmod(num_pairs * num_splits, 2 * num_multiprocessors)
        programs = 2 * num_full * num_multiprocessors + max(num_last, enough * (num_last > 0))
        keys = programs * capacity / num_splits
        return keys if num_splits == 1 else 1.05 * keys + 64 * num_multiprocessors

    return min([n for n in SPLITS if n == 1 or n * 64 <= capacity], key=cost)
