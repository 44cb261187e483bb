"""Custom operators: one node per forward and per backward for torch.compile and activation checkpointing.

Every implementation with a closed-form backward has a forward operator (output and row statistics), a
backward operator (the four gradients), a fake for each, the autograd formula that connects them, and one
function with the signature that `parallax.api` calls. The fakes return contiguous results, and so must the
operators: compiled code relies on the fake's strides. Operators have no optional outputs: those that softmax
attention (r = None) does not have are empty, `[0]`.
"""

from typing import Any

import torch
from torch import Tensor

from parallax import eager


@torch.library.custom_op("parallax::eager_forward", mutates_args=())
def eager_forward(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window_size: int | None,
    block_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `parallax.eager.forward` as one operator.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32/fp64.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        scale: Factor of q.k.
        window_size: Keys that a query sees, or None.
        block_size: Queries in a tile, for each batch row; None for `eager.default_block_size`.

    Returns:
        `o [B, T, H, K]`, and `lse [B, T, H]` and `tbar [B, T, H]` (`[0]` without r), which carry no gradient.
    """
    with torch.autocast(q.device.type, enabled=False):
        return eager.forward(q, r, k, v, cu_seqlens, scale, window_size, block_size)


@eager_forward.register_fake
def _eager_forward_fake(q: Tensor, r: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=eager.accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse, lse.new_empty((0,) if r is None else lse.shape)


@torch.library.custom_op("parallax::eager_backward", mutates_args=())
def eager_backward(
    do: Tensor,
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    tbar: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window_size: int | None,
    block_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `parallax.eager.backward` as one operator.

    Args:
        do: Gradient of o `[B, T, H, K]`.
        q: Queries `[B, T, H, K]`, as given to `eager_forward`; likewise the inputs not listed here.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        lse: From `eager_forward`.
        tbar: From `eager_forward`.
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        scale: Factor of q.k.
        window_size: Keys that a query sees, or None.
        block_size: Queries in a tile, for each batch row; None for `eager.default_block_size`.

    Returns:
        `dq`, `dr` (`[0]` without r), `dk`, `dv` in the shapes and dtype of the inputs.
    """
    with torch.autocast(q.device.type, enabled=False):
        return eager.backward(do, q, r, k, v, lse, tbar, cu_seqlens, scale, window_size, block_size)


@eager_backward.register_fake
def _backward_fake(
    do: Tensor, q: Tensor, r: Tensor | None, k: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dr = q.new_empty((0,) if r is None else r.shape)
    return q.new_empty(q.shape), dr, k.new_empty(k.shape), k.new_empty(k.shape)


def _mark_only_output_differentiable(ctx: Any, *others: Tensor) -> None:
    """Mark all outputs but the first as non-differentiable, and pass missing gradients as None.

    Autograd would otherwise fill zeros for the others, for vbar as many as for the output.
    """
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _save_for_eager_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, r, k, v, cu_seqlens, ctx.scale, ctx.window_size, ctx.block_size = inputs
    _, lse, tbar = output
    ctx.save_for_backward(q, r, k, v, lse, tbar, cu_seqlens)
    _mark_only_output_differentiable(ctx, lse, tbar)


def _differentiate_eager(ctx: Any, do: Tensor | None, _dlse: None, _dtbar: None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 8
    q, r, k, v, lse, tbar, cu_seqlens = ctx.saved_tensors
    dq, dr, dk, dv = eager_backward(
        do, q, r, k, v, lse, tbar, cu_seqlens, ctx.scale, ctx.window_size, ctx.block_size
    )
    return dq, None if r is None else dr, dk, dv, None, None, None, None


eager_forward.register_autograd(_differentiate_eager, setup_context=_save_for_eager_backward)


def eager_attention(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Compute differentiable Parallax or softmax attention by the eager operators, without validation.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32/fp64.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        scale: Factor of q.k.
        cu_seqlens: Document bounds `[N + 1]` int32 with batch 1, or None.
        window_size: Number of newest keys that a query sees, its own included; None for all.
        block_size: Queries in a tile, for each batch row; None for `eager.default_block_size`.

    Returns:
        Output `[B, T, H, K]` in the dtype of q.
    """
    return eager_forward(q, r, k, v, cu_seqlens, scale, window_size, block_size)[0]


@torch.library.custom_op("parallax::triton_forward", mutates_args=())
def triton_forward(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window_size: int | None,
    save_vbar: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `parallax.kernels.forward` as one operator.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        scale: Factor of q.k, positive.
        window_size: Keys that a query sees, or None.
        save_vbar: Whether a backward may follow.

    Returns:
        `o [B, T, H, K]`, and, without gradients, vbar (the same shape, or `[0]` if not saved), lse and tbar
        `[B, H, T]`; without r vbar and tbar are `[0]`.
    """
    from parallax.kernels import forward

    with torch.cuda.device_of(q):
        return forward.forward(q, r, k, v, cu_seqlens, scale, window_size, save_vbar=save_vbar)


@triton_forward.register_fake
def _triton_forward_fake(q: Tensor, r: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, save_vbar = others
    batch_size, num_tokens, num_heads, _ = q.shape
    lse = q.new_empty((batch_size, num_heads, num_tokens), dtype=torch.float32)
    vbar = q.new_empty(q.shape if save_vbar and r is not None else (0,))
    return q.new_empty(q.shape), vbar, lse, lse.new_empty((0,) if r is None else lse.shape)


@torch.library.custom_op("parallax::triton_backward", mutates_args=())
def triton_backward(
    do: Tensor,
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    vbar: Tensor,
    lse: Tensor,
    tbar: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    window_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `parallax.kernels.backward` as one operator.

    Args:
        do: Gradient of o `[B, T, H, K]`.
        q: Queries `[B, T, H, K]`, as given to `triton_forward`; likewise the inputs not listed here.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        o: From `triton_forward`, as are the next three.
        vbar: Softmax attention `[B, T, H, K]`; `[0]` without r.
        lse: `[B, H, T]`.
        tbar: `[B, H, T]`; `[0]` without r.
        cu_seqlens: Document bounds `[N + 1]` int32, or None.
        scale: Factor of q.k.
        window_size: Keys that a query sees, or None.

    Returns:
        `dq`, `dr` (`[0]` without r), `dk`, `dv` in the shapes and dtype of the inputs.
    """
    from parallax.kernels import backward

    with torch.cuda.device_of(q):
        return backward.backward(do, q, r, k, v, o, vbar, lse, tbar, cu_seqlens, scale, window_size)


triton_backward.register_fake(_backward_fake)


def _save_for_triton_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, r, k, v, cu_seqlens, ctx.scale, ctx.window_size, ctx.save_vbar = inputs
    o, vbar, lse, tbar = output
    ctx.save_for_backward(q, r, k, v, o, vbar, lse, tbar, cu_seqlens)
    _mark_only_output_differentiable(ctx, vbar, lse, tbar)


def _differentiate_triton(
    ctx: Any, do: Tensor | None, _dvbar: None, _dlse: None, _dtbar: None
) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 8
    if not ctx.save_vbar:
        raise RuntimeError("the forward ran with save_vbar=False, so it has no backward; pass save_vbar=True")
    *tensors, cu_seqlens = ctx.saved_tensors
    dq, dr, dk, dv = triton_backward(do, *tensors, cu_seqlens, ctx.scale, ctx.window_size)
    has_probes = tensors[1] is not None
    return dq, dr if has_probes else None, dk, dv, None, None, None, None


triton_forward.register_autograd(_differentiate_triton, setup_context=_save_for_triton_backward)


def triton_attention(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
) -> Tensor:
    """Compute differentiable Parallax or softmax attention by the Triton kernels.

    Args:
        q: Queries `[B, T, H, K]`, bf16/fp16/fp32, with K of `parallax.kernels.tiles.HEAD_DIMS`.
        r: Probes `[B, T, H, K]`, or None for softmax attention.
        k: Keys `[B, T, G, K]`.
        v: Values `[B, T, G, K]`.
        scale: Factor of q.k, positive.
        cu_seqlens: Document bounds `[N + 1]` int32 with batch 1, or None.
        window_size: Number of newest keys that a query sees, its own included; None for all.

    Returns:
        Output `[B, T, H, K]` in the dtype of q.
    """
    assert scale > 0, "`tiles.refusal` checks this"
    save_vbar = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, r, k, v))
    return triton_forward(q, r, k, v, cu_seqlens, scale, window_size, save_vbar)[0]
