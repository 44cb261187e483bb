from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.attention.base import normalize_heads
from models.kernels import norm_rope
from parallax.testing import assert_within_budget, relative_error
from tests.interpreter import run_interpreted
from tests.models.kernels.norm_rope_cases import CASES, Case, make, ours, plain, truth

INTERPRETED = Path(__file__).with_name("interpreted_norm_rope.py")


def test_kernels_in_interpreter() -> None:
    run_interpreted(INTERPRETED)


def test_the_cpu_takes_the_plain_path() -> None:
    inputs = make(CASES[0], torch.float32, "cpu")
    assert not norm_rope.serves(inputs[0])
    actual, expected = ours(*inputs), plain(*inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_norm_of_another_kind_keeps_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    monkeypatch.setattr(norm_rope, "serves", lambda x: True)
    x, norm = torch.randn(1, 600, 2, 64), Doubled(64)
    assert torch.equal(normalize_heads(x, norm, None), norm(x))


@pytest.mark.parametrize("options", [{}, {"eps": 1e-6, "elementwise_affine": False}], ids=["eps", "gain"])
def test_a_norm_without_an_epsilon_or_a_gain_keeps_its_own_forward(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_rope, "serves", lambda x: True)
    x, norm = torch.randn(1, 600, 2, 64), nn.RMSNorm(64, **options)
    assert torch.equal(normalize_heads(x, norm, None), norm(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_no_larger_than_those_of_the_plain_path_on_gpu(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype, "cuda")
    assert norm_rope.serves(inputs[0])
    actual, expected, yardstick = (f(*inputs) for f in (ours, truth, plain))
    for name in expected:
        assert_within_budget(name, actual[name], expected[name], yardstick[name], dtype)
        if dtype != torch.float32:
            error, plain_error = (relative_error(x[name], expected[name]) for x in (actual, yardstick))
            assert error <= 1.02 * plain_error, name
    again = ours(*inputs)
    assert all(torch.equal(actual[name], again[name]) for name in actual)


@pytest.mark.gpu
def test_few_tokens_take_the_plain_path_on_gpu() -> None:
    x = torch.randn(1, norm_rope.MIN_TOKENS, 2, 64, device="cuda")
    assert norm_rope.serves(x)
    assert not norm_rope.serves(x[:, 1:])
    assert not norm_rope.serves(x.double())


@pytest.mark.gpu
def test_compiled_in_one_graph_on_gpu() -> None:
    x, gain, dy, rope = make(CASES[2], torch.bfloat16, "cuda")
    norm = nn.RMSNorm(128, eps=1e-6)
    norm.weight = nn.Parameter(gain)
    weight = torch.eye(512, dtype=torch.bfloat16, device="cuda").requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        heads = (x.flatten(2) @ weight).unflatten(-1, (4, 128))
        return normalize_heads(heads, norm, rope) * 2.0

    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, norm.weight, weight), dy)))
    for plain_result, compiled in zip(*results, strict=True):
        assert relative_error(compiled, plain_result) < 5e-3
