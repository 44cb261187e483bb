"""Chunked cross-entropy of a linear head: the logits of all tokens are never materialized.

The fp32 logits of 32k tokens over 151,936 ids take 20 GB; the 16-bit ones of a chunk of 4096 tokens a
sixteenth of that. The forward also computes the gradients, chunk by chunk; the backward multiplies them by
the incoming scalar. On a GPU the gradient of 16-bit logits replaces them, and the weight's is added up in
fp32 by the products themselves.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F

from models.kernels import cross_entropy as kernel
from models.kernels.scale import scale
from parallax.api import cast_under_autocast
from tokens import IGNORE_INDEX

CHUNK_TOKENS = 4096
"""Tokens per chunk. Larger ones are no faster (benchmarks/results/memory_passes_h200_202611.json)."""


def autocast_disabled(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on a tensor's device; autocast does not support the meta device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _token_losses(
    logits_TV: torch.Tensor, labels_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute each token's loss, `[T, 1]`; returns wide logits, their logsumexp, targets and validity too."""
    wide = logits_TV.double() if logits_TV.dtype == torch.float64 else logits_TV.float()
    lse = torch.logsumexp(wide, dim=-1, keepdim=True)
    valid = (labels_T != IGNORE_INDEX).unsqueeze(1)
    # an invalid label other than IGNORE_INDEX fails in the gather, as in F.cross_entropy
    target = torch.where(valid, labels_T.unsqueeze(1), 0)
    return torch.where(valid, lse - wide.gather(1, target), 0.0), wide, lse, target, valid


def _chunk_token_losses(x_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Compute the loss of each token of a chunk, `[T]`."""
    return _token_losses(x_TD @ weight_VD.T, labels_T)[0].squeeze(1)


def _chunk_loss(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute summed cross-entropy and z-loss of a chunk, `[2]`, and the gradient of its logits, `[T, V]`.

    The gradient is that of their sum, in the logits' dtype.
    """
    losses, wide, lse, target, valid = _token_losses(logits_TV, labels_T)
    columns = torch.arange(wide.shape[1], device=wide.device)
    probabilities, z_losses = torch.exp(wide - lse), torch.zeros_like(lse)
    if z_loss:
        probabilities = probabilities * (1.0 + 2.0 * z_loss * lse)
        z_losses = torch.where(valid, z_loss * lse.square(), 0.0)
    grad = torch.where(valid, probabilities - (columns == target).to(wide.dtype), 0.0)
    return torch.stack((losses.sum(), z_losses.sum())), grad.to(logits_TV.dtype)


# the first call imports the compiler, which takes as long as all of torch, and only a GPU needs it
_compile = functools.cache(torch.compile)


def _loss_and_gradient(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, z_loss: float, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `_chunk_loss`, by the kernel in place of the logits where it serves."""
    if kernel.serves(logits_TV):
        return kernel.cross_entropy_(logits_TV, labels_T, z_loss, needs_grad=needs_grad).sum(0), logits_TV
    chunk_loss = _compile(_chunk_loss) if logits_TV.is_cuda else _chunk_loss
    return chunk_loss(logits_TV, labels_T, z_loss)


def _add_weight_gradient(
    dweight_VD: torch.Tensor | None, dlogits_TV: torch.Tensor, x_TD: torch.Tensor, accumulator: torch.dtype
) -> torch.Tensor:
    """Add a chunk's part to the gradient of the weight in the accumulator's dtype; None stands for zeros."""
    if dlogits_TV.is_cuda and dlogits_TV.dtype != accumulator:
        # the product is not rounded to 16 bits on its way into the sum
        if dweight_VD is None:
            return torch.mm(dlogits_TV.T, x_TD, out_dtype=accumulator)
        return torch.addmm(dweight_VD, dlogits_TV.T, x_TD, out_dtype=accumulator, out=dweight_VD)
    part = (dlogits_TV.T @ x_TD).to(accumulator)
    return part if dweight_VD is None else dweight_VD.add_(part)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        z_loss: float,
        chunk_tokens: int,
        needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        accumulator = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        sums = torch.zeros(2, dtype=accumulator, device=x_TD.device)
        dx = torch.empty_like(x_TD) if needs_grad else None
        dweight = None
        for start in range(0, x_TD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = x_TD[rows] @ weight_VD.T
            part, dlogits = _loss_and_gradient(logits, labels_T[rows], z_loss, needs_grad)
            sums += part
            if dx is not None:
                torch.mm(dlogits, weight_VD, out=dx[rows])
                dweight = _add_weight_gradient(dweight, dlogits, x_TD[rows], accumulator)
            # before the next chunk's are allocated
            del logits, dlogits
        if dx is not None:
            if dweight is None:
                dweight = torch.zeros_like(weight_VD, dtype=accumulator)
            ctx.save_for_backward(dx, dweight)
            ctx.weight_dtype = weight_VD.dtype
        loss, z = sums.sum(), sums[1]
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "linear_cross_entropy has no second derivative; for create_graph=True use "
                "models.loss.cross_entropy on the logits"
            )
        dloss, _ = grad_outputs
        dx, dweight = ctx.saved_tensors
        # not dx * dloss: torch would round the scalar to dx's dtype first, which biases all gradients alike
        return scale(dx, dloss, dx.dtype), scale(dweight, dloss, ctx.weight_dtype), None, None, None, None


def linear_cross_entropy(
    x_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> torch.Tensor:
    """Compute the summed cross-entropy of `x @ weight.T`; differentiable once.

    Under autocast x and the weight are cast to its dtype. Logits are rounded to x's dtype; their softmax is
    computed in fp32.

    Args:
        x_BTD: Hidden states `[B, T, D]`.
        weight_VD: Weight of the head `[V, D]`, x's dtype.
        labels_BT: Token ids `[B, T]`, int64; IGNORE_INDEX is skipped. Any other label that is not one raises
            on the CPU; on a GPU the loss is NaN.
        chunk_tokens: Tokens per chunk.

    Returns:
        The sum over valid labels in nats, a scalar in fp32 (fp64 for fp64 input).
    """
    return linear_cross_entropy_with_z_loss(x_BTD, weight_VD, labels_BT, 0.0, chunk_tokens)[0]


def linear_cross_entropy_with_z_loss(
    x_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_BT: torch.Tensor,
    z_loss: float,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute linear_cross_entropy plus a z-loss, which keeps the logits' normalizer near 1.

    The z-loss of a token is z_loss (log sum_v exp logit_v)^2 (PaLM, arXiv 2204.02311, section 5).

    Args:
        x_BTD: As for linear_cross_entropy.
        weight_VD: As for linear_cross_entropy.
        labels_BT: As for linear_cross_entropy.
        z_loss: Coefficient; 0 adds nothing.
        chunk_tokens: Tokens per chunk.

    Returns:
        The sum of both over valid labels in nats, differentiable once, and the z-loss in it, which has no
        gradient: scalars in fp32 (fp64 for fp64 input).
    """
    x_BTD, weight_VD = cast_under_autocast(x_BTD, weight_VD)
    with autocast_disabled(x_BTD):
        return _LinearCrossEntropy.apply(
            x_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), z_loss, chunk_tokens, torch.is_grad_enabled()
        )


@torch.no_grad()
def linear_token_losses(
    x_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> torch.Tensor:
    """Compute the cross-entropy of `x @ weight.T` for each token, for evaluation: without a gradient.

    Args:
        x_BTD: As for linear_cross_entropy.
        weight_VD: As for linear_cross_entropy.
        labels_BT: As for linear_cross_entropy.
        chunk_tokens: Tokens per chunk.

    Returns:
        Losses in nats, 0 where the label is IGNORE_INDEX, `[B, T]` in fp32 (fp64 for fp64 input).
    """
    x_BTD, weight_VD = cast_under_autocast(x_BTD, weight_VD)
    token_losses = _compile(_chunk_token_losses) if x_BTD.is_cuda else _chunk_token_losses
    with autocast_disabled(x_BTD):
        chunks = zip(
            x_BTD.flatten(0, 1).split(chunk_tokens), labels_BT.flatten().split(chunk_tokens), strict=True
        )
        losses = torch.cat([token_losses(x_TD, weight_VD, labels_T) for x_TD, labels_T in chunks])
    return losses.view(labels_BT.shape)


def cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Compute the summed cross-entropy of materialized logits; the reference of linear_cross_entropy."""
    wide = logits_BTV.flatten(0, 1)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return F.cross_entropy(wide, labels_BT.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
