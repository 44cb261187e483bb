"""The decode kernels compiled for capability 9.0 and 8.9, no GPU needed; `test_kernels.py` runs this file.

Launches stop after compilation. The tests check what a compiler may break: that queries and probes in one
tile take as many products and as much shared memory as queries alone, and that registers do not spill.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from parallax.kernels.decode import decode
from parallax.kernels.decode_tiles import DecodeDevice, DecodeTile, tile_of

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
H200 = DecodeDevice(132, has_fast_memory=True)
SMALL = DecodeDevice(128, has_fast_memory=False, has_large_shared_memory=False)
TILES = sorted({tile_of(*call, 2, 128, H200) for call in ((8, 512), (8, 32768), (128, 1024), (1024, 128))})


class Driver(SimpleNamespace):
    """Stub of the driver interface that the compiler calls."""

    def __init__(self, capability: int = 90) -> None:
        super().__init__(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compile kernels at launch without running them; return the list of compiled kernels."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, grid=(1, 1, 1), warmup=True, **options))
        return kernels[-1]

    monkeypatch.setattr(JITFunction, "run", compile_only)
    driver.set_active(cast(Any, Driver()))
    return kernels


def launch(num_heads: int, with_probe: bool, tile: DecodeTile, head_dim: int = 128) -> None:
    q, k = torch.empty(1, 1, num_heads, head_dim).bfloat16(), torch.empty(1, 256, 2, head_dim).bfloat16()
    lengths = torch.empty(1, dtype=torch.int32)
    decode(q, q if with_probe else None, k, k, lengths, None, None, 0.1, torch.empty_like(q), tile=tile)


def stack_bytes(ptx: str, folder: Path) -> int:
    source = folder / "kernel.ptx"
    source.write_text(ptx, encoding="utf-8")
    command = [PTXAS, "-v", "-arch=sm_90a", source, "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return int(re.findall(r"(\d+) bytes stack frame", report)[0])


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_probes_need_no_extra_products(tile: DecodeTile, compiled: list[Any], tmp_path: Path) -> None:
    launch(4, True, tile)
    launch(4, False, tile)
    ours, softmax = compiled[0], compiled[2 if tile.num_splits > 1 else 1]
    for kernel in (ours, softmax):
        assert stack_bytes(kernel.asm["ptx"], tmp_path) == 0
        assert kernel.metadata.shared <= 227 << 10
    assert ours.asm["ptx"].count("mma.sync") == softmax.asm["ptx"].count("mma.sync")
    assert ours.metadata.shared == softmax.metadata.shared


@pytest.mark.parametrize("num_heads", [32, 18])
def test_separate_probe_tiles_do_not_spill(num_heads: int, compiled: list[Any], tmp_path: Path) -> None:
    tile = tile_of(8, 4096, num_heads // 2, 128, H200)
    launch(num_heads, True, tile)
    assert stack_bytes(compiled[0].asm["ptx"], tmp_path) == 0
    assert compiled[0].metadata.shared <= 227 << 10


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_heads", [4, 32])
@pytest.mark.parametrize("num_pairs", [8, 1024])
def test_tiles_fit_into_the_shared_memory_of_small_gpus(
    num_pairs: int, num_heads: int, head_dim: int, compiled: list[Any]
) -> None:
    driver.set_active(cast(Any, Driver(89)))
    tile = tile_of(num_pairs, 4096, num_heads // 2, head_dim, SMALL)
    launch(num_heads, True, tile, head_dim)
    assert compiled[0].metadata.shared <= 99 << 10
