"""Fixtures of the models' tests."""

import importlib.util
import math
import sys
from typing import Any

import pytest
import torch

from models.attention.recurrent.fla import import_fla


def _cost(config: Any) -> tuple[int, int, int]:
    """Order configs of triton.autotune: about four warps, few stages, small blocks."""
    blocks = (value for value in config.kwargs.values() if isinstance(value, int))
    return abs(config.num_warps - 4), config.num_stages, math.prod(blocks)


@pytest.fixture(scope="session")
def fast_autotuning() -> None:
    """Leave fla's kernels, if installed, one autotuning config each, which compiles fast and fits any GPU.

    The 14 or so that each has would be compiled and timed for every shape; speed is not tested.
    """
    if importlib.util.find_spec("fla") is None:
        return
    import_fla(torch.empty(0))
    for name, module in list(sys.modules.items()):
        for kernel in list(vars(module).values()) if name.startswith("fla.") else []:
            while kernel is not None and not hasattr(kernel, "configs"):
                kernel = getattr(kernel, "fn", None)
            if kernel is not None and len(kernel.configs) > 1:
                kernel.configs = [min(kernel.configs, key=_cost)]
