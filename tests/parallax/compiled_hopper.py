"""The Hopper kernels compiled for compute capability 9.0, no GPU needed; `test_kernels.py` runs this file.

Launches stop after compilation. The tests check what a compiler may break: that products of a warpgroup
overlap (ptxas reports it if they are serialized) and that registers do not spill.
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

from parallax.kernels import backward, forward, hopper
from parallax.kernels.addressing import Mask
from parallax.kernels.tiles import _HOPPER, _HOPPER_SHORT, _HOPPER_SPECIALIZED, KernelName, Tile

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
PTXAS, CUOBJDUMP = TOOLS / "ptxas", TOOLS / "cuobjdump"
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS = 256, 4, 2
STACK_BYTES = 160
TILES = [
    *((*key, tile) for table in (_HOPPER_SPECIALIZED, _HOPPER_SHORT) for key, tile in table.items()),
    ("dqdr", 128, _HOPPER["dqdr", 128]),
]


class Driver(SimpleNamespace):
    """Stub of the driver interface that the compiler calls."""

    def __init__(self) -> None:
        super().__init__(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
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
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda device: 132)
    for module in (backward, forward):
        monkeypatch.setattr(module, "can_use_descriptors", lambda *tensors: True)
    return kernels


def launch(
    kernel: KernelName, width: int, tile: Tile, is_bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = (NUM_HEADS, NUM_KV_HEADS)
    q, k = (torch.empty(2, NUM_TOKENS, n, width, dtype=torch.bfloat16) for n in heads)
    r = None if kernel.startswith("softmax") else q
    bounds = torch.empty(NUM_TOKENS, dtype=torch.int32)
    mask = Mask(bounds, bounds, 100) if is_bounded else Mask(None, None, None)
    operands = backward.Operands(q, r, k, k, q)
    if kernel.endswith("forward"):
        if is_bounded:
            monkeypatch.setattr(Mask, "of", lambda *arguments: mask)
        forward.forward(q, r, k, k, None, 0.1, None, save_vbar=not is_bounded, tile=tile)
    elif kernel in ("dqdr", "softmax_dq"):
        lse = torch.empty(2, NUM_HEADS, NUM_TOKENS)
        backward.query_gradients(operands, q, q, lse, lse, mask, 0.1, tile=tile)
    else:
        rows = torch.empty(2 * NUM_HEADS, operands.num_row_constants, NUM_TOKENS)
        backward.key_gradients(operands, rows, mask, 0.1, tile=tile)


def overwritten_operands(sass: str) -> list[str]:
    """Find instructions in innermost product loops that overwrite loop-invariant left operands.

    These are the registers of left operands of products that start from zero, those of the scores, which are
    loaded before the loop. ptxas 12.8 has overwritten them after a branch.
    """
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass)
    jumps = [(re.search(r"BRA\S* (?:!?U?P\d+, )?0x([0-9a-f]+)", line), i) for i, line in enumerate(code)]
    loops = [(int(m.group(1), 16) // 16, i) for m, i in jumps if m and int(m.group(1), 16) // 16 < i]
    loops = [(first, last) for first, last in loops if "HGMMA" in "".join(code[first:last])]
    found: list[str] = []
    for first, last in loops:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops):
            continue
        kept: set[int] = set()
        starts_from_zero = False
        for line in code[first : last + 1]:
            if product := re.search(r"HGMMA\S* R\d+, (?:R(\d+), )?gdesc", line):
                starts_from_zero |= "RZ" in line
                if starts_from_zero and product.group(1):
                    kept.update(range(int(product.group(1)), int(product.group(1)) + 4))
                starts_from_zero &= "gsb0" not in line
        writes = r"(?:@!?U?P\d+ )?(?!ST|HGMMA|SYNCS|BAR|ISETP|FSETP|R2UR|BRA)[A-Z0-9.]+ R(\d+)\b"
        written = ((re.match(writes, line), line) for line in code[first : last + 1])
        found += [line for m, line in written if m and int(m.group(1)) in kept]
    return found


@pytest.mark.parametrize("is_bounded", [False, True], ids=["causal", "bounded"])
@pytest.mark.parametrize(("kernel", "width", "tile"), TILES, ids=str)
def test_products_overlap_and_registers_do_not_spill(
    kernel: KernelName,
    width: int,
    tile: Tile,
    is_bounded: bool,
    compiled: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch(kernel, width, tile, is_bounded, monkeypatch)
    *others, found = compiled
    assert len(others) == tile.key_norms
    source, binary = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(found.asm["ptx"], encoding="utf-8")
    report = subprocess.run(
        [PTXAS, "-v", "-arch=sm_90a", source, "-o", binary], check=True, capture_output=True, text=True
    ).stderr
    assert "serialized" not in report, report
    (stack,) = re.findall(r"(\d+) bytes stack frame", report)
    assert int(stack) <= STACK_BYTES, report
    assert found.metadata.shared <= 227 << 10
    binary.write_bytes(found.asm["cubin"])
    sass = subprocess.run([CUOBJDUMP, "-sass", binary], check=True, capture_output=True, text=True).stdout
    assert not overwritten_operands(sass)
