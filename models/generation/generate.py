"""Text from a model: prefill the prompts, then decode token by token, on a GPU as one CUDA graph a step.

`python -m models.generation --checkpoint runs/0.6b_parallax_muon --prompt "The capital of France is"` writes
the continuation as it comes; without --prompt it continues what it reads from stdin. Several --prompt are
continued together.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from errors import UserError
from models.checkpoint import load_model, model_config
from models.generation.cache import Cache, prefill
from models.generation.decode_step import DecodeStep
from models.generation.sampling import Sampling
from models.generation.text_stream import TextStream, stop_at
from models.qwen3 import Qwen3
from models.run_folder import RunFolder, find_checkpoint, read_run_table
from models.run_tokenizer import check_ids, find_tokenizer
from tokens import END_OF_DOCUMENT

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """Continue prompts, yielding the new tokens of every step.

    Args:
        model: In eval mode, on any device.
        prompts: Ids of each, at least one.
        max_new_tokens: The most tokens to add to each.
        sampling: How tokens are chosen; None for greedy.
        stop_ids: Tokens that end a continuation.
        stop: Called with the index of a prompt and its new tokens after each; true ends the continuation.
        batch_size: Prompts that are continued together.
        compile_blocks: Compile the layers of a decoding step: some seconds once, then fewer, larger kernels.

    Raises:
        UserError: A prompt is empty, or max_new_tokens or batch_size is below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    cache = step = None
    max_seqlen = -(-(max(map(len, prompts), default=0) + max_new_tokens) // 64) * 64
    # prompts of like length finish together, the longest first: what does not fit in memory fails at once
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        if cache is None or step is None or len(rows) != len(cache.lengths_B):
            cache = step = None  # frees the larger one before
            cache = Cache.new(model, len(rows), max_seqlen)
            step = DecodeStep(model, cache, _seeded(sampling or Sampling(), first), compile_blocks)
        cache.reset()
        device = cache.lengths_B.device
        bounds = torch.tensor([0, *(len(prompts[row]) for row in rows)]).cumsum(0).to(device, torch.int32)
        tokens_1T = torch.tensor([[token for row in rows for token in prompts[row]]], device=device)
        x_BD = prefill(model, tokens_1T, bounds, cache)[0, bounds[1:].long() - 1]
        step.start(model.output.logits(x_BD))
        yield from _decode(step, rows, max_new_tokens, stop_ids, stop)


def _seeded(sampling: Sampling, first: int) -> Sampling:
    """A generator of its own for a batch of another size, whose draws are not those of the first batch."""
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
    texts: dict[int, list[int]] = {row: [] for row in rows}
    for count in range(1, max_new_tokens + 1):
        new = []
        for row, token, logprob in zip(rows, *step.read(then_advance=count < max_new_tokens), strict=True):
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
    compile_blocks: bool = False,
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
        compile_blocks: Compile the layers of a decoding step: some seconds once, then fewer, larger kernels.

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run folder, or one of its checkpoints"
    )
    parser.add_argument("--prompt", action="append", help="repeatable; none reads stdin")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="128 by default")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy (default)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="a string that ends the text; repeatable")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder; the run's by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers: for long texts on a GPU")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="bfloat16 on a GPU, float32 on CPU by default")
    return parser


def _load(options: argparse.Namespace) -> tuple[Qwen3, Tokenizer, int]:
    """The model, its tokenizer and the token that ends a document."""
    checkpoint = find_checkpoint(options.checkpoint)
    table = read_run_table(checkpoint)
    data = table.get("data", {})
    file = find_tokenizer(RunFolder.of_checkpoint(checkpoint), data, options.tokenizer)
    if file is None:
        raise UserError(f"{checkpoint} names no tokenizer; give --tokenizer")
    tokenizer = Tokenizer.from_file(str(file / "tokenizer.json" if file.is_dir() else file))
    check_ids(tokenizer, str(file), model_config(table, checkpoint).vocab_size)
    end_of_document = data.get("end_of_document", END_OF_DOCUMENT)
    end = tokenizer.token_to_id(end_of_document)
    if end is None:
        raise UserError(f"{file} has no token {end_of_document!r}, which ends a document of this run")
    is_on_gpu = options.device.startswith("cuda")
    if is_on_gpu and not torch.cuda.is_available():
        raise UserError(f"--device is {options.device}, but there is no CUDA device here; give cpu")
    if is_on_gpu and torch.device(options.device).index is not None:
        torch.cuda.set_device(options.device)
    dtype = _DTYPES[options.dtype or ("bfloat16" if is_on_gpu else "float32")]
    return load_model(checkpoint, device=options.device, dtype=dtype), tokenizer, end


def main() -> None:
    """Run the command line."""
    options = _parser().parse_args()
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    sampling = Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    model, tokenizer, end = _load(options)
    stop = stop_at(tokenizer, options.stop)
    # a shell ends what it pipes with a newline, which nobody means to be continued
    prompts = options.prompt or [sys.stdin.read().removesuffix("\n")]
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids or [end] for prompt in prompts]
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
        stop_ids=(end,),
        stop=stop,
        compile_blocks=options.compile,
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
