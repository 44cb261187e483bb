"""train.py with PyTorch code in the place of the model's kernels, for `benchmarks.plain_path`.

Replaced are the kernels of norm and RoPE and of the loss. Attention, compilation and CUDA graphs are chosen
by the config (PLAIN_OVERRIDES). The optimizer is the same.
"""

import os
import sys

import train
from models.kernels import cross_entropy, norm_rope

PLAIN_OVERRIDES = (
    *("--model.attention.impl", "eager"),
    *("--training.compile", "false"),
    *("--training.cuda_graphs", "false"),
)


def replace_kernels() -> None:
    """Let no kernel of the model serve any tensor, so that PyTorch code does."""
    norm_rope.serves = lambda x: False
    cross_entropy.serves = lambda logits: False


if __name__ == "__main__":
    replace_kernels()
    code = train.main([*sys.argv[1:], *PLAIN_OVERRIDES])
    os._exit(code)  # as train.py
