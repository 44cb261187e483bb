"""Fixtures of the tests of models."""

import importlib.util
import sys

import pytest
import torch

from models.attention.recurrent.fla import import_fla


@pytest.fixture(scope="session")
def little_tuning() -> None:
    """Let fla's kernels, where they are, try three settings each: results are tested, not speed.

    They tune over up to a hundred settings a shape, which takes minutes.
    """
    if importlib.util.find_spec("fla") is None:
        return
    import_fla(torch.empty(0))
    for name, module in list(sys.modules.items()):
        for kernel in list(vars(module).values()) if name.startswith("fla.") else []:
            while kernel is not None and not hasattr(kernel, "configs"):
                kernel = getattr(kernel, "fn", None)
            if kernel is not None and len(kernel.configs) > 3:
                kernel.configs = kernel.configs[:: len(kernel.configs) // 3]
