"""The recurrences through flash-linear-attention's CUDA kernels; no other module imports fla.

Arguments and results as in the functions for CPU (delta_rule.py, state_space.py, mesa.py), but for
output_final_state, fla's own option: without it the states are None.
"""

import importlib.util
import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from errors import UnsupportedError
from models.attention.recurrent.gradient_scale import with_scaled_gradients

FLA_CHUNK_TOKENS = 64
"""Chunk length of fla's kernels."""

# with narrower heads fla's kernels of MesaNet read illegal addresses (0.6.0, Triton 3.6, H200)
_MIN_MESA_WIDTH = 64


class _Fla(NamedTuple):
    """The functions of flash-linear-attention 0.6 that are used here."""

    causal_conv1d: Any
    chunk_gated_delta_rule: Any
    chunk_kda: Any
    chunk_mesa_net: Any
    chunk_simple_gla: Any
    has_faulty_gated_backward: bool


def import_fla(like: Tensor) -> _Fla:
    """Import fla's kernels for inputs of a tensor's dtype.

    Raises:
        ImportError: flash-linear-attention is not installed, or its import fails.
        UnsupportedError: The dtype is fp64, which the kernels do not support.
    """
    if like.dtype == torch.float64:
        raise UnsupportedError("the CUDA kernels of the recurrent baselines do not support fp64; use the CPU")
    try:
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda
        from fla.ops.mesa_net import chunk_mesa_net
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla
        from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1
    except ImportError as error:
        raise ImportError(
            "the recurrent baselines run on CUDA through flash-linear-attention, and importing it failed: "
            f"{error}; pip install -e '.[baselines]'"
        ) from error
    is_faulty = IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1
    simple_gla = fused_chunk_simple_gla if is_faulty else chunk_simple_gla
    return _Fla(causal_conv1d, chunk_gated_delta_rule, chunk_kda, chunk_mesa_net, simple_gla, is_faulty)


def skip_tuning() -> None:
    """Leave each of fla's kernels one variant, if fla is installed.

    At its first call a kernel's variants, a dozen or more, are compiled and timed. That takes minutes in all:
    too long for tests, and for models whose training takes no longer.
    """
    if importlib.util.find_spec("fla") is None:
        return
    import_fla(torch.empty(0))
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            _keep_one_variant(vars(module).values())


def _keep_one_variant(kernels: Iterable[Any]) -> None:
    """Leave kernels that triton.autotune has wrapped, also under other decorators, one config each."""
    for kernel in list(kernels):
        while kernel is not None and not hasattr(kernel, "configs"):
            kernel = getattr(kernel, "fn", None)
        if kernel is not None and len(kernel.configs) > 1:
            kernel.configs = [min(kernel.configs, key=_compile_cost)]


def _compile_cost(config: Any) -> tuple[int, int, int]:
    """Order configs of triton.autotune: about four warps, few stages, small blocks; these fit any GPU."""
    blocks = (value for value in config.kwargs.values() if isinstance(value, int))
    return abs(config.num_warps - 4), config.num_stages, math.prod(blocks)


# fla's kernels cannot be traced
@torch.compiler.disable
def fused_convolution(
    x_BTC: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Apply a short causal convolution and silu, as short_convolution."""
    causal_conv1d = import_fla(x_BTC).causal_conv1d
    y_BTC, _ = causal_conv1d(x_BTC, weight, bias, activation="silu", cu_seqlens=cu_seqlens)
    return y_BTC


def fused_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Compute Gated DeltaNet's or Kimi Delta Attention's recurrence, as gated_delta_rule."""
    fla = import_fla(q)
    options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": cu_seqlens}
    options["output_final_state"] = output_final_state
    if g.shape[-1] == 1 and not fla.has_faulty_gated_backward:
        o, state = fla.chunk_gated_delta_rule(q, k, v, g.squeeze(-1), beta, **options)
        return o, (state,)
    if g.shape[-1] == 1:
        # fla's issue 640: the kernel refuses to run; KDA computes the same with a decay per channel
        warnings.warn(
            "Gated DeltaNet runs slower here, through Kimi Delta Attention's kernels: Triton 3.4 to 3.7.0 "
            "miscompiles its own kernels on Hopper; install Triton 3.7.1",
            stacklevel=1,
        )
        g = g.expand(*g.shape[:-1], q.shape[-1])
    o, state = fla.chunk_kda(q, k, v, g, beta, **options)
    return o, (state,)


def fused_state_space(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, cu_seqlens: Tensor | None, output_final_state: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Compute Mamba-2's recurrence, as state_space."""
    options = {"scale": 1.0, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    o, state = import_fla(q).chunk_simple_gla(q, k, v, g, **options)
    return o, (state,)


def fused_mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    ridge: Tensor,
    num_iterations: int,
    *,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Compute MesaNet's recurrence, as mesa."""
    width = q.shape[-1]
    if width < _MIN_MESA_WIDTH:
        # products with zeros change nothing; the ridge of the zeros is anything but zero
        missing = _MIN_MESA_WIDTH - width
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
        ridge = F.pad(ridge, (0, missing), value=1.0)

    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        return import_fla(q).chunk_mesa_net(
            *tensors,
            output_final_state=output_final_state,
            max_CG_iteration=num_iterations,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=cu_seqlens,
        )

    # its backward adds 1e-5 to denominators and stores gradients in fp16: those of a mean loss underflow
    o, *states = with_scaled_gradients(attend, q, k, v, g, beta, ridge)
    states = [None if x is None else x[..., :width, :width] for x in states]
    return o[..., :width], tuple(states)
