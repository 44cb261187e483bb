"""Generation on a GPU: CUDA graphs equal eager decoding, which is as exact as the full forward."""

import copy

import pytest
import torch

from models.attention.base import Attention
from models.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    LinearConfig,
    LocalLinearConfig,
    Mamba2Config,
    MesaNetConfig,
    ModelConfig,
    ParallaxConfig,
    SoftmaxConfig,
)
from models.generation.generate import generate
from models.init import init_weights
from models.qwen3 import Qwen3

pytestmark = pytest.mark.gpu

PROMPTS = [list(range(1, 40)), [7, 8, 9], list(range(300, 20, -1))]


def build(attention: AttentionConfig) -> Qwen3:
    model = Qwen3(ModelConfig(size="debug", vocab_size=512, attention=attention, init_std=0.1))
    init_weights(model, 0)
    return model.to("cuda", torch.bfloat16).eval().requires_grad_(False)


def logprobs_of(model: Qwen3, prompt: list[int], new: list[int]) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary at every new token, by one full forward."""
    whole = torch.tensor([prompt + new], device=model.norm.weight.device)
    return model(whole)[0, len(prompt) - 1 : -1].double().log_softmax(-1).cpu()


kinds = pytest.mark.parametrize(
    "attention",
    [
        SoftmaxConfig(),
        SoftmaxConfig(window_size=16),
        ParallaxConfig(),
        ParallaxConfig(window_size=16),
        LinearConfig(),
        LocalLinearConfig(num_iterations=4),
        GatedDeltaNetConfig(),
        KimiDeltaConfig(),
        MesaNetConfig(),
        Mamba2Config(),
    ],
    ids=lambda a: str(a).split("(", 1)[1][:40],
)


@kinds
def test_generation_is_as_exact_as_the_full_forward(
    attention: AttentionConfig, fast_autotuning: None
) -> None:
    """Error budget: fp64 with the same weights is the truth, the full forward the yardstick."""
    model = build(attention)
    truth_model = copy.deepcopy(model).to("cpu", torch.float64)
    got, plain, truth, gap_to_best, full_error = [], [], [], [], []
    for prompt, result in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=40), strict=True):
        tokens = torch.tensor(result.tokens)[:, None]
        exact = logprobs_of(truth_model, prompt, result.tokens)
        full = logprobs_of(model, prompt, result.tokens)
        got.append(torch.tensor(result.logprobs, dtype=torch.float64))
        plain.append(full.gather(1, tokens).squeeze(1))
        truth.append(exact.gather(1, tokens).squeeze(1))
        gap_to_best.append(exact.max(-1).values - truth[-1])
        full_error.append((full - exact).abs().amax(-1))
    error, allowed = ((torch.cat(x) - torch.cat(truth)).norm() for x in (got, plain))
    assert error <= 2 * allowed + torch.cat(truth).norm() * 2**-8
    # greedy: the sampled token is the best one up to an error in its own and in the best one's logit
    assert torch.cat(gap_to_best).max() <= 4 * torch.cat(full_error).max()


@kinds
def test_a_cuda_graph_equals_eager_decoding(
    attention: AttentionConfig, monkeypatch: pytest.MonkeyPatch, fast_autotuning: None
) -> None:
    model = build(attention)
    captured = generate(model, PROMPTS, max_new_tokens=40)
    for module in model.modules():
        if isinstance(module, Attention):
            monkeypatch.setattr(module, "supports_cuda_graph", False, raising=False)
    assert generate(model, PROMPTS, max_new_tokens=40) == captured


@pytest.mark.parametrize("compile_blocks", [False, True], ids=["eager", "compiled"])
def test_sampling_in_a_cuda_graph_is_reproducible_over_several_batches(compile_blocks: bool) -> None:
    model = build(ParallaxConfig())
    prompts = [list(range(first, first + 39)) for first in (1, 101, 201)]
    prompts = [*prompts, *prompts]  # the same batch twice: the second reuses the graph
    first, again, other = (
        generate(
            model,
            prompts,
            max_new_tokens=20,
            temperature=1.0,
            top_p=0.9,
            seed=seed,
            batch_size=3,
            compile_blocks=compile_blocks,
        )
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    greedy = generate(model, prompts, max_new_tokens=20, batch_size=3, compile_blocks=compile_blocks)
    assert greedy[:3] == greedy[3:]
