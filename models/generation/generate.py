"""Batched generation: prefill of the prompts, then decoding token by token."""

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

import torch

from errors import UserError
from models.generation.cache import Cache, prefill
from models.generation.decode_step import DecodeStep
from models.generation.sampling import Sampling
from models.qwen3 import Qwen3


@dataclass
class Generation:
    """The continuation of a prompt.

    Attributes:
        tokens: Token ids, including the stop token.
        logprobs: Log-probability of each in nats, under the model without temperature, top-k and top-p.
        is_finished: Whether a stop ended it, not max_new_tokens.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_finished: bool = False


@dataclass(frozen=True)
class NewToken:
    """A generated token.

    Attributes:
        row: Index of its prompt.
        token: Its id.
        logprob: Its log-probability in nats.
        is_last: Whether a stop ends the continuation here.
    """

    row: int
    token: int
    logprob: float
    is_last: bool


@torch.no_grad()
def stream(
    model: Qwen3,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stop: Callable[[int, list[int]], bool] | None = None,
    batch_size: int = 64,
    compile_blocks: bool = False,
) -> Iterator[list[NewToken]]:
    """Continue prompts, and yield the new tokens of every decoding step.

    Args:
        model: In eval mode, on any device.
        prompts: Token ids of each prompt, at least one.
        max_new_tokens: Maximum number of new tokens per prompt.
        sampling: Sampling options; None for greedy decoding.
        stop_ids: Tokens that end a continuation.
        stop: Called with the index of a prompt and its new tokens, after each token; True ends the
            continuation.
        batch_size: Prompts per batch.
        compile_blocks: Compile the blocks for decoding, which takes seconds and fuses kernels.

    Raises:
        UserError: A prompt is empty, or max_new_tokens or batch_size is below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    cache = step = None
    max_seqlen = -(-(max(map(len, prompts), default=0) + max_new_tokens) // 64) * 64
    # prompts of similar length finish together; the longest come first, so that OOM happens at the start
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        if cache is None or step is None or len(rows) != len(cache.lengths_B):
            cache = step = None  # frees the old one first
            cache = Cache.new(model, len(rows), max_seqlen)
            step = DecodeStep(model, cache, _for_batch(sampling or Sampling(), first), compile_blocks)
        cache.reset()
        device = cache.lengths_B.device
        bounds = torch.tensor([0, *(len(prompts[row]) for row in rows)]).cumsum(0)
        cu_seqlens = bounds.to(device, torch.int32)
        tokens_1T = torch.tensor([[token for row in rows for token in prompts[row]]], device=device)
        x_1TD = prefill(model, tokens_1T, cu_seqlens, cache)
        step.start(model.output.logits(x_1TD[0, cu_seqlens[1:].long() - 1]))
        yield from _decode(step, rows, max_new_tokens, stop_ids, stop)


def _for_batch(sampling: Sampling, first: int) -> Sampling:
    """Return the options with another seed for a later DecodeStep, so that it does not repeat the draws."""
    if first == 0:
        return sampling
    return replace(sampling, seed=random.Random(f"{sampling.seed} {first}").getrandbits(63))


def _decode(
    step: DecodeStep,
    rows: list[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    stop: Callable[[int, list[int]], bool] | None,
) -> Iterator[list[NewToken]]:
    unfinished: dict[int, list[int]] = {row: [] for row in rows}
    for count in range(1, max_new_tokens + 1):
        new = []
        for row, token, logprob in zip(rows, *step.read(then_advance=count < max_new_tokens), strict=True):
            if row not in unfinished:
                continue
            unfinished[row].append(token)
            is_last = token in stop_ids or (stop is not None and stop(row, unfinished[row]))
            new.append(NewToken(row, token, logprob, is_last))
            if is_last:
                del unfinished[row]
        yield new
        if not unfinished:
            return


def generate(
    model: Qwen3,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    stop: Callable[[int, list[int]], bool] | None = None,
    batch_size: int = 64,
    compile_blocks: bool = False,
) -> list[Generation]:
    """Continue prompts.

    Args:
        model: In eval mode, on any device.
        prompts: Token ids of each prompt, at least one.
        max_new_tokens: As stream.
        temperature: As Sampling.
        top_k: As Sampling.
        top_p: As Sampling.
        seed: As Sampling.
        stop_ids: As stream.
        stop: As stream.
        batch_size: As stream.
        compile_blocks: As stream.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        UserError: A prompt is empty, or an option is out of range.
    """
    results = [Generation() for _ in prompts]
    steps = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        stop_ids=stop_ids,
        stop=stop,
        batch_size=batch_size,
        compile_blocks=compile_blocks,
    )
    for new in steps:
        for each in new:
            result = results[each.row]
            result.tokens.append(each.token)
            result.logprobs.append(each.logprob)
            result.is_finished = each.is_last
    return results
