"""Attention implementations that `benchmarks.attention` times: ours, with and without probes, and others."""

import re
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_timing import Provider
from errors import UserError
from parallax import parallax_attention


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


def _fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = import_module("flash_attn.cute").flash_attn_func(q, k, v, causal=True)
    # some releases return the log-sum-exp too
    return found[0] if isinstance(found, tuple) else found


PROVIDERS = {
    "ours": Provider("ours", parallax_attention, is_parallax=True),
    "ours_softmax": Provider("ours, softmax", _our_softmax, is_parallax=False),
    "fla": Provider("fla, Parallax", _fla, is_parallax=True, module="fla"),
    "cudnn": Provider("cuDNN, softmax", partial(_softmax, SDPBackend.CUDNN_ATTENTION), is_parallax=False),
    "fa2": Provider(
        "FlashAttention-2, softmax", partial(_softmax, SDPBackend.FLASH_ATTENTION), is_parallax=False
    ),
    "fa4": Provider("FlashAttention-4, softmax", _fa4, is_parallax=False, module="flash_attn.cute"),
    "flex": Provider("FlexAttention, softmax", _flex, is_parallax=False, heads_first=True),
}


def missing_module(provider: Provider) -> str | None:
    """Return the module that a provider needs and that is not installed, or None."""
    name = provider.module
    try:
        return None if name is None or find_spec(name) is not None else name
    except ModuleNotFoundError:  # of the package that would hold it
        return name


def parse_heads(text: str) -> tuple[int, int]:
    """Parse the numbers of query and key/value heads, such as "16/8".

    Raises:
        UserError: It is something else.
    """
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None:
        raise UserError(f"--heads is {text!r}, wanted query/kv heads such as 16/8")
    return int(found[1]), int(found[2])
