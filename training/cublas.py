"""What cuBLAS may choose kernels from."""

import os

import torch
from torch import nn

_LEAST_SIDE = 1024
"""Of the smallest matrix whose products took no more time without a workspace."""


def limit_workspace(model: nn.Module) -> None:
    """Keep cuBLAS from using a workspace where that saves time; call it before the first matrix product.

    Without a workspace it chooses kernels with a static tile scheduler. Those with a dynamic one have a
    counter in the workspace, which is cleared before each of them: on an H200 the products of a 0.6B or 1.7B
    layer take 2% more time (benchmarks/results/products_h200_202612.json). Split-K needs a workspace too:
    without it the gradient of a matrix of 512 x 512, which has too few tiles to fill a GPU, takes twice the
    time. So models with matrices below 1024 x 1024 keep the workspace, and so do GPUs other than Hopper,
    where nothing was measured. So do models with biases: torch adds these by cuBLASLt, which stops without a
    workspace. For others' code that calls it, it gets one of its own.

    Args:
        model: The model, on its device.
    """
    parameters = dict(model.named_parameters())
    matrices = [p for p in parameters.values() if p.ndim == 2]
    on_hopper = all(p.is_cuda and torch.cuda.get_device_capability(p.device)[0] == 9 for p in matrices)
    is_large = all(min(p.shape) >= _LEAST_SIDE for p in matrices)
    has_biases = any(name.endswith("bias") for name in parameters)
    if on_hopper and is_large and not has_biases and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
        os.environ["TORCH_CUBLASLT_UNIFIED_WORKSPACE"] = "0"
