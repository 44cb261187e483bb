"""The short causal depthwise convolution that the recurrent baselines apply before their recurrences.

Letters: B batch, T tokens, C channels, W width of the window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    past_BPC: Tensor | None = None,
) -> Tensor:
    """Compute silu(bias + sum_s weight_s x_{t - W + 1 + s}) within documents, in at least fp32.

    Args:
        x_BTC: Input `[B, T, C]`.
        weight_CW: Weights `[C, W]`, the last one that of the token itself.
        bias_C: Biases `[C]`, or None.
        cu_seqlens: Document boundaries `[N + 1]`, int32, with B = 1; None for B rows of one document each.
        past_BPC: The W - 1 inputs before the first token, `[B, W - 1, C]`; None for zeros. Not together with
            cu_seqlens.

    Returns:
        `[B, T, C]` in x's dtype.
    """
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    num_tokens, width = x_BTC.shape[1], weight_CW.shape[1]
    weight_CW = weight_CW.to(dtype)
    x = x_BTC.to(dtype)
    padded = F.pad(x, (0, 0, width - 1, 0)) if past_BPC is None else torch.cat((past_BPC.to(dtype), x), dim=1)
    y_BTC = weight_CW[:, -1] * x
    position_T1 = None
    if cu_seqlens is not None:
        token_T = torch.arange(num_tokens, device=x.device)
        first_T = cu_seqlens[torch.searchsorted(cu_seqlens.long(), token_T, right=True) - 1]
        position_T1 = (token_T - first_T).unsqueeze(-1)
    for back in range(1, width):
        earlier = padded[:, width - 1 - back : width - 1 - back + num_tokens]
        if position_T1 is not None:
            earlier = earlier * (position_T1 >= back)
        y_BTC = y_BTC + weight_CW[:, -1 - back] * earlier
    if bias_C is not None:
        y_BTC = y_BTC + bias_C.to(dtype)
    return F.silu(y_BTC).to(x_BTC.dtype)


def last_inputs(x_1TC: Tensor, cu_seqlens: Tensor, num_inputs: int) -> Tensor:
    """Return the last inputs of every document, the convolution's state, with zeros before its first token.

    Args:
        x_1TC: Input `[1, T, C]` of packed documents.
        cu_seqlens: Document boundaries `[N + 1]`, int32.
        num_inputs: W - 1.

    Returns:
        `[N, W - 1, C]`, x's dtype.
    """
    bounds = cu_seqlens.long()
    token_NP = bounds[1:, None] - num_inputs + torch.arange(num_inputs, device=x_1TC.device)
    is_inside = token_NP >= bounds[:-1, None]
    return x_1TC[0, token_NP.clamp(min=0)] * is_inside.unsqueeze(-1)
