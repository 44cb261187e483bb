"""Splits and tiles of the decode kernels by call size and device."""

from types import SimpleNamespace

import pytest

from parallax.kernels.decode_tiles import DecodeDevice, DecodeTile, tile_of


def properties(num_multiprocessors: int, memory: int, shared: int = 232_448) -> SimpleNamespace:
    """Return what `torch.cuda.get_device_properties` has of a GPU, its sizes in bytes."""
    return SimpleNamespace(
        multi_processor_count=num_multiprocessors, total_memory=memory, shared_memory_per_block_optin=shared
    )


H100 = DecodeDevice.of(properties(132, 84_900_000_000))
H200 = DecodeDevice.of(properties(132, 150_110_000_000))


def test_h200_is_recognized_by_its_memory() -> None:
    assert DecodeDevice(132, has_fast_memory=False) == H100
    assert DecodeDevice(132, has_fast_memory=True) == H200
    # an H100 NVL and a GH200 with HBM3
    for memory in (100_000_000_000, 102_000_000_000):
        assert not DecodeDevice.of(properties(132, memory)).has_fast_memory


@pytest.mark.parametrize("device", [H100, H200], ids=["h100", "h200"])
def test_number_of_splits_fills_the_device(device: DecodeDevice) -> None:
    def num_splits(pairs: int, capacity: int) -> int:
        tile = tile_of(pairs, capacity, 2, 128, device)
        assert 1 <= tile.num_splits <= max(1, capacity // 64)
        return tile.num_splits

    assert 92 <= 8 * num_splits(8, 32768) <= 132
    assert 92 <= 8 * num_splits(8, 1024) <= 132
    assert num_splits(8, 64) == 1
    assert [num_splits(pairs, 4096) for pairs in (128, 256, 1024, 8192)] == [1, 1, 1, 1]
    assert num_splits(300, 4096) > 1  # unsplit, a last round of 36 programs would leave the device idle


def test_h200_tiles_are_the_measured_ones() -> None:
    def tile(pairs: int, capacity: int, num_rows: int = 2, head_dim: int = 128) -> DecodeTile:
        return tile_of(pairs, capacity, num_rows, head_dim, H200)

    assert tile(8, 128) == (1, 128, 4, 3)
    assert tile(8, 512) == (8, 64, 4, 5)
    assert tile(8, 4096) == (16, 64, 4, 5)
    assert tile(8, 32768) == (16, 128, 4, 3)
    assert tile(128, 1024) == (1, 128, 4, 3)
    assert tile(1024, 1024) == (1, 32, 2, 4)
    assert tile(8192, 128) == (1, 32, 2, 4)
    assert tile(1024, 4096) == (1, 128, 4, 3)
    assert tile(1024, 4096, head_dim=64) == (1, 64, 2, 4)
    # a second round of programs would be nearly empty
    assert tile(144, 8192).block_s == 32
    # probes in a separate tile
    assert tile(128, 4096, num_rows=16).block_s == 64
    assert tile(128, 4096, num_rows=32).block_s == 32


def test_h100_tiles_are_unchanged() -> None:
    assert tile_of(8, 4096, 2, 128, H100) == (12, 64, 4, 4)
    assert tile_of(128, 4096, 2, 64, H100) == (1, 128, 4, 4)
    assert tile_of(8192, 128, 2, 128, H100) == (1, 64, 4, 3)
    assert tile_of(8, 4096, 128, 128, H100) == (12, 32, 8, 3)


def test_small_gpus_keep_fewer_tiles_in_flight() -> None:
    # an A100 has room for four; an RTX 4090 and a GB10, of 128 GB, do not
    a100 = DecodeDevice.of(properties(108, 85_100_000_000, shared=166_912))
    small = [DecodeDevice.of(properties(128, memory, shared=101_376)) for memory in (25_300_000_000, 2**37)]
    assert tile_of(8, 4096, 2, 128, a100).num_stages == 4
    assert [tile_of(8, 4096, 2, 128, device).num_stages for device in small] == [3, 3]
