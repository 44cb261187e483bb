"""Generation throughput at batch size 1, Parallax beside softmax attention, in one process.

`python -m benchmarks.generation` builds both models of a size with random weights, and alternates between
them: each continues a prompt of --context random tokens greedily by --new-tokens, with compiled layers. It
reports medians over rounds of the tokens/s after the prefill, including sampling and host overhead.
"""

import shlex
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from errors import run_command
from models.config import ModelConfig, ParallaxConfig, SoftmaxConfig
from models.device import check_device
from models.generation.generate import stream
from models.init import init_weights
from models.qwen3 import Qwen3

_ATTENTION_CONFIGS = {"softmax": SoftmaxConfig(), "parallax": ParallaxConfig()}


def build(size: str, attention: str, device: str) -> Qwen3:
    """Build a bf16 model with random weights, in eval mode.

    Args:
        size: Key of models.sizes.SIZES.
        attention: "softmax" or "parallax".
        device: Device of the model.
    """
    model = Qwen3(ModelConfig(size=size, vocab_size=151936, attention=_ATTENTION_CONFIGS[attention]))
    init_weights(model, 0)
    return model.to(device, torch.bfloat16).eval().requires_grad_(False)


def measure(model: Qwen3, prompt: list[int], num_new: int) -> dict[str, float]:
    """Time one generation.

    Args:
        model: From build.
        prompt: Token ids.
        num_new: Number of tokens to generate.

    Returns:
        Seconds to the first token, including CUDA graph capture, and tokens/s after it.
    """
    started = time.perf_counter()
    first = started
    for index, _ in enumerate(stream(model, [prompt], max_new_tokens=num_new, compile_blocks=True)):
        if index == 0:
            first = time.perf_counter()
    rate = (num_new - 1) / (time.perf_counter() - first)
    return {"first_token_s": first - started, "tokens_per_second": rate}


def main() -> None:
    """Run `python -m benchmarks.generation`."""
    parser = make_parser("generation", __doc__, name="generation")
    parser.add_argument("--size", default="0.6b", help="size of the models (0.6b)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt (1024)")
    parser.add_argument("--new-tokens", type=int, default=512, help="tokens to generate (512)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--device", default="cuda")
    options = parse(parser)
    check_device(options.device)
    models = {name: build(options.size, name, options.device) for name in _ATTENTION_CONFIGS}
    prompt = torch.randint(0, 151936, (options.context,), generator=torch.Generator().manual_seed(0)).tolist()
    rounds: list[dict[str, Any]] = [
        {name: measure(model, prompt, options.new_tokens) for name, model in models.items()}
        for _ in range(options.rounds + 1)
    ][1:]  # the first round compiles
    medians = {name: statistics.median(r[name]["tokens_per_second"] for r in rounds) for name in models}
    ratio = medians["parallax"] / medians["softmax"]
    command = f"python -m benchmarks.generation {shlex.join(sys.argv[1:])}".strip()
    result = {
        "command": command,
        "tokens_per_second": medians,
        "parallax_to_softmax": ratio,
        "rounds": rounds,
    }
    print("wrote", write_result(options.name, result, options.out))
    print(", ".join(f"{name} {rate:,.1f} tokens/s" for name, rate in medians.items()), f"ratio {ratio:.3f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
