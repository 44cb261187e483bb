"""fla's kernels without their tuning."""

import sys
from typing import Any

import pytest
import torch

from models.attention.recurrent.fla import import_fla, skip_tuning

fla = pytest.importorskip("fla")


def _num_configs() -> list[int]:
    """Numbers of variants of the kernels of what is imported, whatever decorates them."""
    found: dict[int, int] = {}
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.startswith("fla.") else []:
            kernel: Any = value
            while kernel is not None and not hasattr(kernel, "configs"):
                kernel = getattr(kernel, "fn", None)
            if kernel is not None:
                found[id(kernel)] = len(kernel.configs)
    return [*found.values()]


def test_each_kernel_keeps_one_variant() -> None:
    import_fla(torch.empty(0))
    before = _num_configs()
    skip_tuning()
    assert len(before) > 30
    assert _num_configs() == [min(number, 1) for number in before]
