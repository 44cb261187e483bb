"""16-bit casts of fp32 weights in the forward, on one rank, where FSDP2 has nothing to shard.

The casts are made around a compiled module, not in its graph: there Inductor computes with the gains of
norms, and adds up their gradients, without rounding them to 16 bits, and the result is not that of FSDP2.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from models.kernels.accumulate import accumulate_


class _Cast(torch.autograd.Function):
    """Casts of parameters; gradients of the casts are added to those of the parameters."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: nn.Parameter) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parameters = parameters
        casts = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
        torch._foreach_copy_(casts, parameters)
        frozen = (c for c, p in zip(casts, parameters, strict=True) if not p.requires_grad)
        ctx.mark_non_differentiable(*frozen)
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *map(_accumulate, ctx.parameters, gradients)


def _accumulate(parameter: nn.Parameter, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Add a 16-bit gradient to the parameter's in one pass; return it as fp32 if there is none yet."""
    if gradient is None:
        return None
    if parameter.grad is not None:
        accumulate_(parameter.grad, gradient)
        return None
    # not gradient.to(): so the kernel is compiled before a CUDA graph of the next micro-batch is captured
    first = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    accumulate_(first, gradient)
    return first


def cast_in_forward(
    module: nn.Module, owners: Sequence[nn.Module], dtype: torch.dtype, *, recast_in_backward: bool
) -> None:
    """Replace a module's forward by one that computes with casts of parameters; each is cast once.

    Loss and gradients are those of FSDP2 on one rank, bit by bit. copy.deepcopy raises TypeError, as with
    FSDP2: a copy would compute with the weights of the original.

    Args:
        module: The module.
        owners: Modules in it all of whose parameters, fp32, are cast; outside of the forward they stay as
            they are. They are looked up in each forward, since to_empty() replaces them.
        dtype: What to cast to.
        recast_in_backward: Free the casts after the forward and cast again in the backward. Not within eager
            activation checkpointing, which does so itself.
    """
    forward = module.forward
    places = [
        (owner, name)
        for root in owners
        for owner in root.modules()
        for name, _ in owner.named_parameters(recurse=False, remove_duplicate=False)
    ]

    # by its attributes a compiled forward would take the place of this one in a compiled caller
    @functools.wraps(forward, updated=())
    def forward_with_casts(*args: Any, **kwargs: Any) -> Any:
        parameters = [owner.get_parameter(name) for owner, name in places]
        unique = list(dict.fromkeys(parameters))
        casts = dict(zip(unique, _Cast.apply(dtype, *unique), strict=True))
        hooks = _recasting(casts) if recast_in_backward else nullcontext()
        with _in_place_of(places, [casts[parameter] for parameter in parameters]), hooks:
            return forward(*args, **kwargs)

    module.forward = forward_with_casts
    module.__deepcopy__ = _refuse_copy  # pyrefly: ignore [bad-argument-type]


def _refuse_copy(memo: dict[int, Any]) -> NoReturn:
    raise TypeError("a model that casts its weights cannot be copied; build another and load the state dict")


@contextmanager
def _in_place_of(places: Sequence[tuple[nn.Module, str]], tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters, as torch.func.functional_call does."""
    parameters = [owner._parameters[name] for owner, name in places]
    try:
        for (owner, name), tensor in zip(places, tensors, strict=True):
            owner._parameters[name] = tensor  # pyrefly: ignore [unsupported-operation]
        yield
    finally:
        for (owner, name), parameter in zip(places, parameters, strict=True):
            owner._parameters[name] = parameter


def _recasting(casts: Mapping[nn.Parameter, torch.Tensor]) -> saved_tensors_hooks:
    """Return a context in which autograd saves a parameter for each of its casts and views of them."""
    sources = {
        cast.untyped_storage().data_ptr(): (parameter, cast.dtype) for parameter, cast in casts.items()
    }

    def pack(saved: torch.Tensor) -> Any:
        source = sources.get(saved.untyped_storage().data_ptr())
        if source is None:
            return saved.detach()  # an output that its own node keeps would never be freed
        return *source, saved.size(), saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        parameter, dtype, *view = packed
        return parameter.detach().to(dtype).as_strided(*view)

    return saved_tensors_hooks(pack, unpack)
