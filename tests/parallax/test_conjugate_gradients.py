"""The tolerance of conjugate gradients follows the input dtype, at no cost in accuracy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax import (
    affine,
    affine_mesanet,
    affine_state,
    local_linear,
    local_linear_attention,
    local_linear_decode,
)
from parallax.affine_state import add_keys, mesanet_output
from parallax.conjugate_gradients import LinearMap, conjugate_gradients, residual_tolerance
from parallax.reference import affine_mesanet_reference, local_linear_reference
from parallax.testing import Inputs, make_inputs, relative_error

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ATTENTIONS = {"lla": local_linear_attention, "affine_mesanet": affine_mesanet}
DEFINITIONS = {"lla": local_linear_reference, "affine_mesanet": affine_mesanet_reference}
attentions = pytest.mark.parametrize("name", ATTENTIONS)


class Solves(list[tuple[float, int]]):
    """Tolerance of each solve and its number of products."""

    def solve(self, apply: LinearMap, b: Tensor, num_iterations: int, tolerance: float) -> Tensor:
        """Call conjugate_gradients; record tolerance and number of products."""
        num_products = 0

        def counted(x: Tensor) -> Tensor:
            nonlocal num_products
            num_products += 1
            return apply(x)

        x = conjugate_gradients(counted, b, num_iterations, tolerance)
        self.append((tolerance, num_products))
        return x


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> Solves:
    recorded = Solves()
    for module in (local_linear, affine, affine_state):
        monkeypatch.setattr(module, "conjugate_gradients", recorded.solve)
    return recorded


def output_and_gradients(attend: Callable[..., Tensor], inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    o = attend(*leaves, **options)
    gradients = torch.autograd.grad(o, leaves, inputs.do.to(o.dtype))
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *gradients), strict=True))


def test_tolerance_is_that_of_the_least_precise_dtype() -> None:
    assert residual_tolerance(FP64) == 2.0**-50
    assert residual_tolerance(FP32) == 2.0**-21
    assert residual_tolerance(FP16) == 2.0**-16
    assert residual_tolerance(BF16) == 2.0**-13
    assert residual_tolerance(FP32, FP16, BF16) == residual_tolerance(BF16, FP32) == 2.0**-13


def test_row_stops_once_its_residual_is_within_the_tolerance() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(50, 32, 32, dtype=FP64, generator=generator)
    matrices = factors @ factors.mT / 32 + torch.eye(32)
    b = torch.randn(50, 32, dtype=FP64, generator=generator)

    def apply(x: Tensor) -> Tensor:
        return (matrices @ x[..., None]).squeeze(-1)

    counts, solves = [], Solves()
    for tolerance in (1e-2, 1e-4, 1e-8):
        residual = b - apply(solves.solve(apply, b, 100, tolerance))
        counts.append(solves[-1][1])
        assert (residual.norm(dim=-1) <= 1.01 * tolerance * b.norm(dim=-1)).all()
    assert counts[0] < counts[1] < counts[2]


@attentions
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((BF16, BF16, BF16), BF16),
        ((FP16, FP16, FP16), FP16),
        ((FP32, FP32, FP32), FP32),
        ((FP64, FP64, FP64), FP64),
        ((FP32, BF16, FP32), BF16),
        ((FP16, FP32, FP32), FP16),
        # low precision of the values alone does not affect the probe or the gradients of q and k
        ((FP32, FP32, BF16), FP32),
    ],
    ids=str,
)
def test_tolerance_of_both_solves_follows_the_dtypes_of_queries_and_keys(
    name: str, dtypes: tuple[torch.dtype, ...], expected: torch.dtype, solves: Solves
) -> None:
    q, _, k, v, do = make_inputs(1, 40, 2, 1, 16, dtype=FP64)
    inputs = Inputs(q.to(dtypes[0]), q, k.to(dtypes[1]), v.to(dtypes[2]), do)
    output_and_gradients(ATTENTIONS[name], inputs)
    assert [tolerance for tolerance, _ in solves] == [residual_tolerance(expected)] * 2


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_tolerance_of_decoding_follows_the_dtype_of_its_inputs(dtype: torch.dtype, solves: Solves) -> None:
    q, _, k, v, _ = make_inputs(2, 40, 2, 1, 16, dtype=dtype)
    lengths = torch.tensor([40, 30], dtype=torch.int32)
    local_linear_decode(q[:, -1:], k, v, cache_seqlens=lengths)
    sums = {name: torch.zeros(2, 1, 16) for name in ("k", "v")}
    sums |= {name: torch.zeros(2, 1, 16, 16) for name in ("vk", "kk")}
    add_keys(sums, k, v)
    mesanet_output(sums, torch.tensor([40.0, 40.0]), q[:, -1], 10.0, 32)
    assert [tolerance for tolerance, _ in solves] == [residual_tolerance(dtype)] * 2


@attentions
@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
def test_16_bit_inputs_take_fewer_products_than_32_bit_ones(name: str, ridge: float, solves: Solves) -> None:
    inputs = make_inputs(1, 128, 2, 1, 64, dtype=BF16)
    for dtype in (BF16, FP32):
        output_and_gradients(ATTENTIONS[name], inputs.to(dtype), ridge=ridge, num_iterations=100)
    forward, backward, exact_forward, exact_backward = (num_products for _, num_products in solves)
    assert forward <= 0.8 * exact_forward
    assert backward <= 0.8 * exact_backward


@attentions
# with a small ridge the matrices are nearly singular, which amplifies rounding in the solution
@pytest.mark.parametrize(("ridge", "share"), [(0.1, 1 / 2), (1.0, 1 / 8), (10.0, 1 / 10)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("key_offset", [0.0, 3.0])
def test_stopping_early_costs_less_than_rounding(
    name: str,
    ridge: float,
    share: float,
    dtype: torch.dtype,
    key_offset: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before_rounding = make_inputs(1, 128, 4, 2, 64, dtype=FP32, key_offset=key_offset)
    run = partial(output_and_gradients, ATTENTIONS[name], ridge=ridge, num_iterations=100)
    inputs = before_rounding.to(dtype).to(FP32)
    exact, of_exact_inputs = run(inputs), run(before_rounding)
    for module in (local_linear, affine):
        monkeypatch.setattr(module, "residual_tolerance", lambda *dtypes: residual_tolerance(dtype))
    for key, stopped_early in run(inputs).items():
        error = relative_error(stopped_early, exact[key])
        of_result = relative_error(exact[key].to(dtype), exact[key])
        of_inputs = relative_error(exact[key], of_exact_inputs[key])
        assert error < share * of_result, (key, error, of_result)
        assert error < share / 2 * of_inputs, (key, error, of_inputs)


@attentions
@pytest.mark.parametrize("ridge", [0.1, 10.0])
@pytest.mark.parametrize("key_offset", [0.0, 3.0])
def test_bf16_is_as_accurate_as_with_the_tolerance_of_fp32(
    name: str, ridge: float, key_offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(1, 128, 4, 2, 64, dtype=BF16, key_offset=key_offset)
    truth = output_and_gradients(DEFINITIONS[name], inputs.to(FP64), ridge=ridge)
    actual = output_and_gradients(ATTENTIONS[name], inputs, ridge=ridge, num_iterations=100)
    for module in (local_linear, affine):
        monkeypatch.setattr(module, "residual_tolerance", lambda *dtypes: residual_tolerance(FP32))
    yardstick = output_and_gradients(ATTENTIONS[name], inputs, ridge=ridge, num_iterations=100)
    for key in truth:
        assert actual[key].dtype == BF16
        bound = 1.125 * relative_error(yardstick[key], truth[key])
        assert relative_error(actual[key], truth[key]) < bound, key
