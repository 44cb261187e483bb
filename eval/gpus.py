"""The GPUs that this process may give to others."""

import os

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty without a GPU."""
    every = ",".join(map(str, range(torch.cuda.device_count())))
    return [gpu.strip() for gpu in os.environ.get(VISIBLE, every).split(",") if gpu.strip()]
