"""Generation on a GPU: a captured graph gives what the calls in it give, and what the full forward gives."""

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
from models.generation import generate
from models.init import init_weights
from models.qwen3 import Qwen3

pytestmark = pytest.mark.gpu

PROMPTS = [list(range(1, 40)), [7, 8, 9], list(range(300, 20, -1))]


def build(attention: AttentionConfig) -> Qwen3:
    model = Qwen3(ModelConfig(size="debug", vocab_size=512, attention=attention, init_std=0.05))
    init_weights(model, 0)
    return model.to("cuda", torch.bfloat16).eval().requires_grad_(False)


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
def test_generation_equals_the_full_forward(attention: AttentionConfig, little_tuning: None) -> None:
    model = build(attention)
    results = generate(model, PROMPTS, max_new_tokens=40)
    for prompt, result in zip(PROMPTS, results, strict=True):
        whole = torch.tensor([prompt + result.tokens], device="cuda")
        logprobs = model(whole)[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        best = logprobs.max(-1).values
        got = logprobs.gather(1, torch.tensor(result.tokens, device="cuda")[:, None]).squeeze(1)
        # bf16: a tie may fall the other way, but a token is never much worse than the best
        assert (best - got).max() < 0.1
        assert (got - torch.tensor(result.logprobs, device="cuda")).abs().max() < 0.1


@kinds
def test_a_graph_gives_what_its_calls_give(
    attention: AttentionConfig, monkeypatch: pytest.MonkeyPatch, little_tuning: None
) -> None:
    model = build(attention)
    captured = generate(model, PROMPTS, max_new_tokens=40)
    for module in model.modules():
        if isinstance(module, Attention):
            monkeypatch.setattr(module, "extends_in_graph", False, raising=False)
    assert generate(model, PROMPTS, max_new_tokens=40) == captured


@pytest.mark.parametrize("compile_blocks", [False, True], ids=["eager", "compiled"])
def test_sampling_in_a_graph_repeats_by_its_seed_over_several_batches(compile_blocks: bool) -> None:
    model = build(ParallaxConfig())
    first, again, other = (
        generate(
            model,
            [*PROMPTS, *PROMPTS],  # twice the same batch: the second reuses cache and graph
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
    greedy = generate(
        model, [*PROMPTS, *PROMPTS], max_new_tokens=20, batch_size=3, compile_blocks=compile_blocks
    )
    assert greedy[:3] == greedy[3:]
