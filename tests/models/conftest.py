"""Fixtures of the models' tests."""

import importlib.util
import sys

import pytest
import torch

from models.attention.recurrent.fla import import_fla


@pytest.fixture(scope="session")
def fast_autotuning() -> None:
    """Reduce the autotuning of fla's kernels, if installed, to three configs each.

    Up to a hundred configs per shape take minutes, and speed is not tested.
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
