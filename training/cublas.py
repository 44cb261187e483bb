"""What cuBLAS may choose kernels from."""

import os
from collections.abc import Iterable

import torch

_LEAST_SIDE = 1024
"""Of the smallest matrix whose products have been measured without a workspace: they took no more time."""


def limit_workspace(parameters: Iterable[torch.Tensor]) -> None:
    """Keep cuBLAS from using a workspace where that saves time; call it before the first matrix product.

    Without a workspace it chooses kernels with a static tile scheduler. Those with a dynamic one have a
    counter in the workspace, which is cleared before each of them: on an H200 the products of a 0.6B layer
    take 2 to 4% more time (benchmarks/results/products_h200_202611.txt). Split-K needs a workspace too, and
    the gradient of a smaller matrix than was measured may have too few tiles to fill a GPU without it. So
    models that have such matrices keep the workspace, and so do GPUs other than Hopper.

    Args:
        parameters: The model's, on its device.
    """
    matrices = [p for p in parameters if p.ndim == 2]
    on_hopper = all(p.is_cuda and torch.cuda.get_device_capability(p.device)[0] == 9 for p in matrices)
    if on_hopper and all(min(p.shape) >= _LEAST_SIDE for p in matrices):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")
