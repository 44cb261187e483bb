"""Attention implementations that `benchmarks.attention` times: ours, with and without probes, and others."""

import re
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from errors import UserError
from parallax import parallax_attention


class Provider(NamedTuple):
    """An attention implementation to time.

    Attributes:
        label: Column header in the table.
        attend: Called as attend(q, r, k, v), without r for softmax attention, in the provider's layout.
        is_parallax: Whether it takes the probe r.
        heads_first: Whether inputs have the layout `[B, H, T, K]`.
    """

    label: str
    attend: Callable[..., Tensor]
    is_parallax: bool
    heads_first: bool = False

    @property
    def products(self) -> tuple[int, int]:
        """Number of products counted as FLOPs, forward and backward."""
        return (4, 8) if self.is_parallax else (2, 5)


def _our_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return parallax_attention(q, None, k, v)


def _softmax(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch._functorch import config as functorch_config
    from torch.nn.attention.flex_attention import flex_attention

    # warm-up and rounds differentiate separate graphs of the same compiled function
    functorch_config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


@cache
def _causal_blocks(num_tokens: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    return create_block_mask(is_visible, None, None, num_tokens, num_tokens, device="cuda")


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks = _causal_blocks(q.shape[2])
    return _compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def _fla(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("fla.ops.parallax").parallel_parallax(q, r, k, v)


PROVIDERS = {
    "ours": Provider("ours", parallax_attention, is_parallax=True),
    "ours_softmax": Provider("ours, softmax", _our_softmax, is_parallax=False),
    "fla": Provider("fla, Parallax", _fla, is_parallax=True),
    "cudnn": Provider("cuDNN, softmax", partial(_softmax, SDPBackend.CUDNN_ATTENTION), is_parallax=False),
    "fa2": Provider(
        "FlashAttention-2, softmax", partial(_softmax, SDPBackend.FLASH_ATTENTION), is_parallax=False
    ),
    "flex": Provider("FlexAttention, softmax", _flex, is_parallax=False, heads_first=True),
}


def parse_heads(text: str) -> tuple[int, int]:
    """Parse the numbers of query and key/value heads, such as "16/8".

    Raises:
        UserError: It is something else.
    """
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None:
        raise UserError(f"--heads is {text!r}, wanted query/kv heads such as 16/8")
    return int(found[1]), int(found[2])
