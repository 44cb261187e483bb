"""Causal product sum_{j <= i} (x_i.y_j) z_j within documents, chunked, in linear time.

The sums of (17) of `parallax.reference` are of this form. Inside a chunk of `CHUNK_TOKENS` the sum is a
masked matrix of scores times values; earlier chunks enter through the state, their sum of y_j z_j^T, as in
chunked linear attention. Document masks apply to both. The states are accumulated by a product with a matrix
of zeros and ones, without a sequential loop over chunks, in T^2 K^2 / CHUNK_TOKENS^2 operations: a small part
of attention's T^2 K. Memory is O(T (K + CHUNK_TOKENS)) per head.

Letters: B batch, T tokens, G key/value heads, R = H / G, N chunks of C tokens; W, X any width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 64
"""Tokens per chunk: about the head width, where the work within chunks equals that between them."""


class PastSums(NamedTuple):
    """The part of sum_j (x_i.y_j) z_j that does not depend on x."""

    y_BGRNCX: Tensor
    z_BGRNCW: Tensor
    state_BGRNXW: Tensor  # sums of y_j z_j^T over the document's earlier chunks
    hidden_NCC: Tensor  # masked pairs within a chunk
    is_restarted_NC1: Tensor  # queries whose document starts inside the chunk


@torch.library.custom_op("parallax::causal_product", mutates_args=())
def causal_product(x: Tensor, y: Tensor, z: Tensor, ids: Tensor, is_reversed: bool) -> Tensor:
    """Compute sum_j (x_i.y_j) z_j over the j <= i of i's document, as one custom operator.

    An operator's backward runs without autocast, traced or not. Saved for the backward: the inputs.

    Args:
        x: `[B, G, R, T, X]`, fp32/fp64; R may be 1 in any of the three.
        y: `[B, G, R, T, X]`.
        z: `[B, G, R, T, W]`.
        ids: Document of each token `[T]`, int64.
        is_reversed: Sum over j >= i instead.

    Returns:
        `[B, G, R, T, W]`.
    """
    if is_reversed:
        x, y, z, ids = x.flip(3), y.flip(3), z.flip(3), ids.flip(0)
    with torch.autocast(x.device.type, enabled=False):
        out = attend_past(x, sum_past(y, z, ids))
    return out.flip(3) if is_reversed else out.contiguous()


@causal_product.register_fake
def _causal_product_fake(x: Tensor, y: Tensor, z: Tensor, ids: Tensor, is_reversed: bool) -> Tensor:
    num_repeats = max(x.shape[2], y.shape[2], z.shape[2])
    return z.new_empty((*x.shape[:2], num_repeats, *x.shape[3:4], z.shape[4]))


def _save_factors(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.is_reversed = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_product(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    x, y, z, ids = ctx.saved_tensors
    dx = causal_product(do, z, y, ids, ctx.is_reversed)
    dy = causal_product(z, do, x, ids, not ctx.is_reversed)
    dz = causal_product(y, x, do, ids, not ctx.is_reversed)
    gradients = (d.sum_to_size(a.shape) for d, a in ((dx, x), (dy, y), (dz, z)))
    return *gradients, None, None


causal_product.register_autograd(_differentiate_product, setup_context=_save_factors)


def sum_past(y_BGRTX: Tensor, z_BGRTW: Tensor, ids_T: Tensor) -> PastSums:
    """Split y and z into chunks and compute the state before each.

    Args:
        y_BGRTX: `[B, G, R, T, X]`, fp32/fp64.
        z_BGRTW: `[B, G, R, T, W]`.
        ids_T: Document of each token, int64.
    """
    chunk = max(1, min(CHUNK_TOKENS, ids_T.shape[0]))
    ids_NC = F.pad(ids_T, (0, -ids_T.shape[0] % chunk), value=-1).unflatten(0, (-1, chunk))
    first_N1, last_N1 = ids_NC[:, :1], ids_NC[:, -1:]
    y_BGRNCX, z_BGRNCW = _in_chunks(y_BGRTX, chunk), _in_chunks(z_BGRTW, chunk)
    # the state of chunk n sums the earlier chunks that end in the document in which chunk n starts
    reaches_NN = (first_N1 == last_N1.mT) & _lower_triangle(ids_NC.shape[0], ids_T).tril(-1)
    sums_BGRNXW = y_BGRNCX.masked_fill((ids_NC != last_N1)[..., None], 0.0).mT @ z_BGRNCW
    state_BGRNF = reaches_NN.to(z_BGRTW.dtype) @ sums_BGRNXW.flatten(-2)
    state_BGRNXW = state_BGRNF.unflatten(-1, sums_BGRNXW.shape[-2:])
    hidden_NCC = (ids_NC[:, :, None] != ids_NC[:, None]) | ~_lower_triangle(chunk, ids_T)
    return PastSums(y_BGRNCX, z_BGRNCW, state_BGRNXW, hidden_NCC, (ids_NC != first_N1)[..., None])


def attend_past(x_BGRTX: Tensor, past: PastSums) -> Tensor:
    """Compute sum_j (x_i.y_j) z_j, `[B, G, R, T, W]`.

    Args:
        x_BGRTX: `[B, G, R, T, X]`.
        past: From sum_past.
    """
    x_BGRNCX = _in_chunks(x_BGRTX, past.hidden_NCC.shape[1])
    out = (x_BGRNCX @ past.y_BGRNCX.mT).masked_fill_(past.hidden_NCC, 0.0) @ past.z_BGRNCW
    out += x_BGRNCX.masked_fill(past.is_restarted_NC1, 0.0) @ past.state_BGRNXW
    return out.flatten(3, 4)[:, :, :, : x_BGRTX.shape[3]]


def _in_chunks(x_BGRTX: Tensor, chunk: int) -> Tensor:
    """Return `[B, G, R, N, C, X]`, the last chunk padded with zeros."""
    tail = -x_BGRTX.shape[3] % chunk
    return (F.pad(x_BGRTX, (0, 0, 0, tail)) if tail else x_BGRTX).unflatten(3, (-1, chunk))


def _lower_triangle(size: int, like: Tensor) -> Tensor:
    """Return a boolean lower triangle `[size, size]`, diagonal included."""
    return torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
