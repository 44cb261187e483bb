"""The choice of the next token from logits."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: What logits are divided by; 0 for the likeliest token.
        top_k: Tokens to choose from, the likeliest ones; None for all.
        top_p: Probability that those to choose from have together at least, the likeliest ones (Holtzman et
            al. 2020); None for all.
        seed: Of the generator, which all sequences of a batch share.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or above, and finite; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens; got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, or None for all tokens; got {self.top_p}")


def choose(
    logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the next token of each sequence.

    Args:
        logits_BV: Logits `[B, V]`, any floating dtype.
        sampling: How.
        generator: On the logits' device; None where temperature is 0.

    Returns:
        Ids `[B]`, int64, and their log-probabilities in nats `[B]`, fp32.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0.0:
        tokens_B = logits_BV.argmax(-1)
    else:
        scaled_BV = logits_BV / sampling.temperature
        if sampling.top_k is not None and sampling.top_k < scaled_BV.shape[1]:
            smallest_B1 = scaled_BV.topk(sampling.top_k).values[:, -1:]
            scaled_BV = scaled_BV.masked_fill(scaled_BV < smallest_B1, float("-inf"))
        probabilities_BV = scaled_BV.softmax(-1)
        if sampling.top_p is not None:
            sorted_BV, order_BV = probabilities_BV.sort(descending=True)
            # a token stays if those before it do not have enough yet: the first always does
            is_cut_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
            probabilities_BV = probabilities_BV.scatter(1, order_BV, sorted_BV.masked_fill(is_cut_BV, 0.0))
        # the first of exponential clocks with these rates (Gumbel-max), which a CUDA graph holds
        clocks_BV = torch.empty_like(probabilities_BV).exponential_(generator=generator)
        tokens_B = (probabilities_BV / clocks_BV).argmax(-1)
    logprobs_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)
    return tokens_B, logprobs_B
