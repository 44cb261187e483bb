"""Sampling of the next token: greedy, temperature, top-k, top-p."""

from dataclasses import dataclass

import torch

from errors import MAX_SEED, UserError, check_range

# 1 / temperature overflows in fp32 below it; far above it all but the most likely token have probability 0
_MIN_TEMPERATURE = 1e-30


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling options.

    Attributes:
        temperature: Divisor of the logits; 0 for greedy decoding.
        top_k: Sample from the k most likely tokens; None for all.
        top_p: Sample from the smallest set of most likely tokens whose probability is at least top_p (nucleus
            sampling, Holtzman et al. 2020); None for all.
        seed: Seed of the generator, which all sequences of a batch share.

    Raises:
        UserError: An option is out of range, or top_k or top_p is given at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or above, and finite; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, or None for all tokens; got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p must be above 0 and at most 1, or None for all tokens; got {self.top_p}")
        for name in ("top_k", "top_p"):
            if self.temperature == 0.0 and getattr(self, name) is not None:
                raise UserError(f"{name} has no effect on greedy decoding: give a temperature above 0 too")
        check_range(self, 0, MAX_SEED, "seed")


def sample_tokens(
    logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample the next token of each sequence.

    Args:
        logits_BV: Logits `[B, V]`, any floating dtype.
        sampling: Sampling options.
        generator: On the logits' device; None if temperature is 0.

    Returns:
        Token ids `[B]`, int64, and their log-probabilities in nats `[B]`, fp32, before temperature, top-k and
        top-p.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0.0:
        tokens_B = logits_BV.argmax(-1)
    else:
        # the largest becomes 0: with a small temperature the others overflow alone, to a probability of 0
        top_B1 = logits_BV.max(-1, keepdim=True).values
        scaled_BV = (logits_BV - top_B1) / max(sampling.temperature, _MIN_TEMPERATURE)
        if sampling.top_k is not None and sampling.top_k < scaled_BV.shape[1]:
            smallest_B1 = scaled_BV.topk(sampling.top_k).values[:, -1:]
            scaled_BV = scaled_BV.masked_fill(scaled_BV < smallest_B1, float("-inf"))
        probabilities_BV = scaled_BV.softmax(-1)
        if sampling.top_p is not None:
            sorted_BV, order_BV = probabilities_BV.sort(descending=True)
            # a token is removed if the more likely ones reach top_p without it; the first never is
            is_removed_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
            probabilities_BV = probabilities_BV.scatter(
                1, order_BV, sorted_BV.masked_fill(is_removed_BV, 0.0)
            )
        # argmax of p / Exponential(1) is a sample from p, as by Gumbel-max, and works in a CUDA graph
        noise_BV = torch.empty_like(probabilities_BV).exponential_(generator=generator)
        tokens_B = (probabilities_BV / noise_BV).argmax(-1)
    logprobs_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)
    return tokens_B, logprobs_B
