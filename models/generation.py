"""Text from a model: prefill the prompts, then decode token by token, on a GPU as one CUDA graph a step.

`python -m models.generation --checkpoint runs/0.6b_parallax_muon --prompt "The capital of France is"` writes
the continuation as it comes; without --prompt it continues what it reads from stdin. Several --prompt are
continued together.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from models.attention.base import Attention
from models.cache import Cache, extend, prefill
from models.checkpoint import find_checkpoint, load_model, run_table
from models.hf_tokenizer import find_tokenizer
from models.qwen3 import Qwen3
from models.text_stream import TextStream, stop_at

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@dataclass
class Generation:
    """A continuation.

    Attributes:
        tokens: Its ids; the one that ended it is the last.
        logprobs: Log-probability of each in nats, under the model without temperature or cuts.
        is_finished: It ended by itself, not by the limit on new tokens.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_finished: bool = False


@dataclass(frozen=True)
class NewToken:
    """A token as it comes.

    Attributes:
        row: Index of its prompt.
        token: Its id.
        logprob: Its log-probability in nats.
        is_last: The continuation ends here by itself.
    """

    row: int
    token: int
    logprob: float
    is_last: bool


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
        tokens_B = torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(1)
    logprobs_B = logits_BV.gather(1, tokens_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)
    return tokens_B, logprobs_B


class _Step:
    """One decoding step of a batch; the same on a GPU as a CUDA graph, captured on an empty cache."""

    def __init__(self, model: Qwen3, cache: Cache, sampling: Sampling) -> None:
        self._model, self._cache, self._sampling = model, cache, sampling
        batch, device = len(cache.lengths_B), cache.lengths_B.device
        self._tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._graph: torch.cuda.CUDAGraph | None = None
        attentions = [m for m in model.modules() if isinstance(m, Attention)]
        if device.type == "cuda" and all(attention.extends_in_graph for attention in attentions):
            self._capture()

    def _compute(self) -> None:
        x_BTD = extend(self._model, self._tokens_B1, self._cache)
        self._logits_BV = self._model.output(x_BTD[:, -1], None)

    @torch.no_grad()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, and lets libraries allocate
            self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._compute()
        self._cache.reset()

    def choose(self, logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens and their log-probabilities, `[B]` each."""
        return choose(logits_BV, self._sampling, self._generator)

    @torch.no_grad()
    def __call__(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Add a token to each sequence; the logits of the next `[B, V]`, until the next call."""
        self._tokens_B1.copy_(tokens_B[:, None])
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        return self._logits_BV


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
) -> Iterator[list[NewToken]]:
    """Continue prompts, yielding the new tokens of every step.

    Args:
        model: In eval mode, on any device.
        prompts: Ids of each, at least one.
        max_new_tokens: The most tokens to add to each.
        sampling: How tokens are chosen; None for greedy.
        stop_ids: Tokens that end a continuation.
        stop: Called with the index of a prompt and its new tokens after each; true ends the continuation.
        batch_size: Prompts that are continued together.

    Raises:
        ValueError: A prompt is empty, or max_new_tokens or batch_size is below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    steps: dict[int, tuple[Cache, _Step]] = {}
    max_seqlen = -(-(max(map(len, prompts), default=0) + max_new_tokens) // 64) * 64
    # prompts of like length finish together, the longest first: what does not fit in memory fails at once
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        if len(rows) not in steps:
            cache = Cache.new(model, len(rows), max_seqlen)
            steps[len(rows)] = cache, _Step(model, cache, sampling or Sampling())
        cache, step = steps[len(rows)]
        cache.reset()
        device = cache.lengths_B.device
        bounds = torch.tensor([0, *(len(prompts[row]) for row in rows)]).cumsum(0).to(device, torch.int32)
        tokens_1T = torch.tensor([[token for row in rows for token in prompts[row]]], device=device)
        logits_BV = model.output(prefill(model, tokens_1T, bounds, cache)[0, bounds[1:].long() - 1], None)
        yield from _decode(step, logits_BV, rows, max_new_tokens, stop_ids, stop)


def _decode(
    step: _Step,
    logits_BV: torch.Tensor,
    rows: list[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    stop: Callable[[int, list[int]], bool] | None,
) -> Iterator[list[NewToken]]:
    texts: dict[int, list[int]] = {row: [] for row in rows}
    for count in range(1, max_new_tokens + 1):
        tokens_B, logprobs_B = step.choose(logits_BV)
        if count < max_new_tokens:
            logits_BV = step(tokens_B)  # the device goes on while the host looks at what it has
        new = []
        for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            if row not in texts:
                continue
            texts[row].append(token)
            is_last = token in stop_ids or (stop is not None and stop(row, texts[row]))
            new.append(NewToken(row, token, logprob, is_last))
            if is_last:
                del texts[row]
        yield new
        if not texts:
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
) -> list[Generation]:
    """Continue prompts to their ends.

    Args:
        model: In eval mode, on any device.
        prompts: Ids of each, at least one.
        max_new_tokens: The most tokens to add to each.
        temperature: As Sampling.
        top_k: As Sampling.
        top_p: As Sampling.
        seed: As Sampling.
        stop_ids: Tokens that end a continuation.
        stop: Called with the index of a prompt and its new tokens after each; true ends the continuation.
        batch_size: Prompts that are continued together.

    Returns:
        The continuations, in the order of the prompts.

    Raises:
        ValueError: A prompt is empty, or an option is out of range.
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
    )
    for new in steps:
        for each in new:
            result = results[each.row]
            result.tokens.append(each.token)
            result.logprobs.append(each.logprob)
            result.is_finished = each.is_last
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run folder, or one of its checkpoints"
    )
    parser.add_argument("--prompt", action="append", help="may be given several times; none reads stdin")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy (default)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="a string that ends the text; repeatable")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder; the run's by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="bfloat16 on a GPU, float32 on CPU by default")
    return parser


def main() -> None:
    """Run the command line."""
    options = _parser().parse_args()
    checkpoint = find_checkpoint(options.checkpoint)
    data = run_table(checkpoint).get("data", {})
    file = find_tokenizer(checkpoint.parent.parent, data, options.tokenizer)
    if file is None:
        raise ValueError(f"{checkpoint} names no tokenizer; give --tokenizer")
    tokenizer = Tokenizer.from_file(str(file / "tokenizer.json" if file.is_dir() else file))
    end = tokenizer.token_to_id(data.get("end_of_document", "<|endoftext|>"))
    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    dtype = _DTYPES[options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")]
    model = load_model(checkpoint, device=options.device, dtype=dtype)
    prompts = options.prompt or [sys.stdin.read()]
    ids = [tokenizer.encode(prompt).ids or ([] if end is None else [end]) for prompt in prompts]
    texts = [TextStream(tokenizer, options.stop) for _ in prompts]
    whole = list(prompts)
    is_alone = len(prompts) == 1
    print(prompts[0] if is_alone else "", end="", flush=True)
    num_tokens, started, first = 0, time.perf_counter(), None
    for new in stream(
        model,
        ids,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop_ids=() if end is None else (end,),
        stop=stop_at(tokenizer, options.stop),
    ):
        first = first or time.perf_counter()
        num_tokens += len(new)
        for each in new:
            piece = texts[each.row].add(each.token) if each.token != end else ""
            whole[each.row] += piece
            print(piece if is_alone else "", end="", flush=True)
    now = time.perf_counter()
    for text, prompt in zip(texts, whole, strict=True):
        print(text.end() if is_alone else f"{prompt}{text.end()}\n---", flush=True)
    rate = (num_tokens - len(prompts)) / (now - first) if first and now > first else float("nan")
    print(
        f"{num_tokens} tokens; first after {(first or now) - started:.2f} s, then {rate:,.1f} tokens/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
