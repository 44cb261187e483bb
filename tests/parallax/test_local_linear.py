"""Exact local linear attention against its definition: values, gradients, limits, packing, memory."""

import math
from functools import partial
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import MIN_RIDGE, LocalLinearConfig
from parallax import affine_mesanet, local_linear, local_linear_attention, parallax_attention
from parallax.conjugate_gradients import conjugate_gradients
from parallax.local_linear import MIN_FP32_RIDGE, local_linear_decode, local_linear_probe
from parallax.reference import local_linear_reference
from parallax.testing import CASES, Case, Inputs, cu_seqlens_of, make_inputs, relative_error

Solver = Literal["cg", "direct"]
SOLVERS = get_args(Solver)


def case_id(case: Case) -> str:
    return case.name


def output_and_gradients(attend: Any, inputs: Inputs, **arguments: Any) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    o = attend(*leaves, **arguments)
    gradients = torch.autograd.grad(o, leaves, inputs.do.to(o.dtype))
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *gradients), strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_output_and_gradients_equal_the_definition(case: Case, solver: Solver) -> None:
    inputs = case.inputs(torch.float64, layout="fused")
    actual = output_and_gradients(
        local_linear_attention, inputs, ridge=0.3, solver=solver, num_iterations=100, **case.masking()
    )
    expected = output_and_gradients(local_linear_reference, inputs, ridge=0.3, **case.masking())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_equal_finite_differences(solver: Solver) -> None:
    case = Case("packed_window", 9, num_heads=2, head_dim=3, documents=(1, 6, 0, 2), window_size=4)
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64)[:4]]
    attend = partial(local_linear_attention, ridge=0.2, solver=solver, **case.masking())
    assert torch.autograd.gradcheck(attend, (leaves[0], *leaves[2:]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_infinite_ridge_gives_softmax_attention(solver: Solver) -> None:
    q, r, k, v, _ = make_inputs(2, 70, 4, 2, 16, dtype=torch.float64)
    softmax = parallax_attention(q, torch.zeros_like(r), k, v)
    errors = [
        relative_error(local_linear_attention(q, k, v, ridge=ridge, solver=solver), softmax)
        for ridge in (1e4, 1e8, 1e12)
    ]
    # first order in 1 / ridge
    assert errors[0] / errors[1] == pytest.approx(1e4, rel=1e-2)
    assert errors[2] < 1e-11


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_infinite_bandwidth_gives_affine_mesanet(solver: Solver) -> None:
    inputs = make_inputs(1, 150, 4, 2, 16, dtype=torch.float64)
    arguments = {"ridge": 0.4, "cu_seqlens": cu_seqlens_of((5, 0, 130, 15)), "num_iterations": 100}
    actual = output_and_gradients(local_linear_attention, inputs, scale=0.0, solver=solver, **arguments)
    expected = output_and_gradients(affine_mesanet, inputs, **arguments)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)


def test_values_affine_in_the_keys_are_recovered() -> None:
    q, r, k, _, _ = make_inputs(1, 60, 1, 1, 4, dtype=torch.float64)
    slope = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    o = local_linear_attention(q, k, k @ slope + 3, ridge=1e-9, num_iterations=100)
    # five keys determine the affine map
    torch.testing.assert_close(o[:, 20:], (q @ slope + 3)[:, 20:], rtol=1e-4, atol=1e-4)
    softmax = parallax_attention(q, torch.zeros_like(r), k, k @ slope + 3)
    assert relative_error(softmax[:, 20:], (q @ slope + 3)[:, 20:]) > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_packed_documents_equal_separate_calls(solver: Solver) -> None:
    lengths = (3, 0, 70, 1, 40)
    inputs = make_inputs(1, sum(lengths), 4, 2, 8, dtype=torch.float64)
    attend = partial(local_linear_attention, ridge=0.5, solver=solver)
    packed = output_and_gradients(attend, inputs, cu_seqlens=cu_seqlens_of(lengths))
    parts = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    separate = [output_and_gradients(attend, Inputs(*part)) for part in parts if part[0].shape[1]]
    for name, value in packed.items():
        expected = torch.cat([part[name] for part in separate], dim=1)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_later_tokens_leave_earlier_outputs_bit_identical(solver: Solver) -> None:
    q, _, k, v, _ = make_inputs(1, 100, 2, 1, 16, dtype=torch.float32)
    before = local_linear_attention(q, k, v, ridge=0.1, solver=solver)
    changed = [torch.cat((x[:, :70], 5 * x[:, 70:] + 1), dim=1) for x in (q, k, v)]
    after = local_linear_attention(*changed, ridge=0.1, solver=solver)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_error_is_only_rounding(dtype: torch.dtype, solver: Solver) -> None:
    inputs = make_inputs(1, 130, 4, 2, 32, dtype=dtype, key_offset=3.0)
    actual = output_and_gradients(local_linear_attention, inputs, solver=solver)
    truth = output_and_gradients(local_linear_reference, inputs.to(torch.float64), ridge=10.0)
    for name in truth:
        # computed in fp32: a few roundings (at an offset of 3, of sums ten times the result), and in bf16
        # that of the result
        bound = 2e-5 + (torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0)
        assert actual[name].dtype == dtype
        assert relative_error(actual[name], truth[name]) < bound, name


def test_the_direct_solver_centres_its_moments() -> None:
    inputs = make_inputs(1, 130, 4, 2, 32, dtype=torch.float32, key_offset=30.0)
    o = local_linear_attention(inputs.q, inputs.k, inputs.v, solver="direct")
    wide = inputs.to(torch.float64)
    # raw moments, of keys 30 standard deviations off, are a thousand times the covariance
    assert relative_error(o, local_linear_reference(wide.q, wide.k, wide.v, ridge=10.0)) < 1e-4


def test_autocast_is_disabled_in_the_solver() -> None:
    inputs = make_inputs(1, 40, 2, 1, 16, dtype=torch.float32)
    expected = output_and_gradients(local_linear_attention, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = output_and_gradients(local_linear_attention, inputs)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        mixed = local_linear_attention(inputs.q, inputs.k, inputs.v.bfloat16())
    assert mixed.dtype == torch.bfloat16


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in made if isinstance(x, Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return out


def largest_tensor_of_the_solver(inputs: Inputs, solver: Solver) -> int:
    """Count the elements of the solver's largest tensor; inside an operator a dispatch mode sees nothing."""
    q, k = inputs.q, inputs.k
    num_iterations = 2 if solver == "cg" else None
    with LargestTensor() as mode:
        local_linear._solve(q, torch.zeros_like(q), q, k, None, 0.25, 10.0, None, num_iterations, 1e-7)
    return mode.num_elements


@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_grows_linearly_with_the_length(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_linear, "_DIRECT_ELEMENTS", 2**15)
    largest = []
    for num_tokens in (512, 1024):
        inputs = make_inputs(1, num_tokens, 2, 1, 16, dtype=torch.float32)
        largest.append(largest_tensor_of_the_solver(inputs, solver))
    assert largest[1] <= 2 * largest[0]
    # a tile of 64 queries in two heads, or the direct solver's buffers
    assert largest[1] <= max(64 * 2 * 1024, 2**15 * 2)


def test_memory_of_the_direct_solver_does_not_grow_with_the_squared_head_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_linear, "_DIRECT_ELEMENTS", 2**13)
    inputs = make_inputs(1, 64, 2, 1, 32, dtype=torch.float32)
    # four queries at a time; 64 matrices of both heads would have 2**17 elements
    assert largest_tensor_of_the_solver(inputs, "direct") <= 2**13


@pytest.mark.parametrize("window_size", [None, 1, 4])
def test_decoding_equals_the_last_rows_of_the_whole(window_size: int | None) -> None:
    q, _, k, v, _ = make_inputs(2, 12, 4, 2, 8, dtype=torch.float64)
    options = {"ridge": 0.3, "window_size": window_size, "num_iterations": 100}
    whole = local_linear_attention(q, k, v, **options)  # pyrefly: ignore [bad-argument-type]
    lengths = torch.tensor([12, 12], dtype=torch.int32)
    last = local_linear_decode(q[:, -3:], k, v, cache_seqlens=lengths, **options)  # pyrefly: ignore [bad-argument-type]
    torch.testing.assert_close(last, whole[:, -3:])


def test_conjugate_gradients_stop_by_row() -> None:
    matrices = torch.diag_embed(torch.tensor([[1.0, 1.0], [1.0, 50.0]], dtype=torch.float64))
    b = torch.ones(2, 2, dtype=torch.float64)
    calls = []

    def apply(x: Tensor) -> Tensor:
        calls.append(1)
        return (matrices @ x[..., None]).squeeze(-1)

    x = conjugate_gradients(apply, b, 10, 1e-15)
    torch.testing.assert_close(x, b / torch.tensor([[1.0, 1.0], [1.0, 50.0]], dtype=torch.float64))
    assert len(calls) <= 3
    assert torch.equal(x[0], conjugate_gradients(lambda y: y, b[:1], 10, 1e-15)[0])
    assert torch.equal(conjugate_gradients(apply, 0 * b, 10, 1e-15), 0 * b)


@pytest.mark.parametrize("num_iterations", [None, 8])
def test_operators_pass_opcheck(num_iterations: int | None) -> None:
    q, _, k, _, _ = make_inputs(1, 9, 2, 1, 4, dtype=torch.float64)
    arguments = (cu_seqlens_of((4, 5)), 0.5, 0.3, 3, num_iterations, 1e-15)
    torch.library.opcheck(local_linear_probe, (q.requires_grad_(), k.requires_grad_(), *arguments))


def test_compiled_as_one_graph_equals_eager() -> None:
    inputs = make_inputs(1, 40, 2, 1, 16, dtype=torch.float32)
    arguments = {"cu_seqlens": cu_seqlens_of((30, 10)), "ridge": 1.0}
    compiled = torch.compile(local_linear_attention, fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(local_linear_attention, inputs, **arguments)
    actual = output_and_gradients(compiled, inputs, **arguments)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, r"ridge is 0.0, wanted at least 0.001 \(in fp64 positive\) and finite"),
        ({"ridge": 1e-8}, "ridge is 1e-08, wanted at least 0.001"),
        ({"ridge": math.nan}, "ridge is nan"),
        ({"ridge": float("inf")}, "ridge is inf"),
        ({"solver": "qr"}, "solver is 'qr', wanted 'cg' or 'direct'"),
        ({"num_iterations": 0}, "num_iterations is 0, wanted at least 1"),
        ({"window_size": 0}, "window_size is 0"),
        ({"scale": math.nan}, "scale is nan, wanted a finite factor of q.k"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "cu_seqlens ends at 4"),
    ],
)
def test_wrong_options_raise(options: dict[str, Any], message: str) -> None:
    q, _, k, v, _ = make_inputs(1, 5, 2, 1, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        local_linear_attention(q, k, v, **options)


def test_the_smallest_ridge_of_a_config_is_solved_to_some_percent() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 256, 1, 128, generator=generator)
    num_iterations = LocalLinearConfig().num_iterations

    def error(ridge: float) -> float:
        exact = local_linear_attention(q.double(), k.double(), v.double(), ridge=ridge, solver="direct")
        o = local_linear_attention(q, k, v, ridge=ridge, num_iterations=num_iterations)
        return relative_error(o, exact)

    assert error(MIN_RIDGE) < 0.03
    assert error(MIN_RIDGE / 3) > 0.06


def test_fp64_takes_any_positive_ridge() -> None:
    q, _, k, v, _ = make_inputs(1, 5, 2, 1, 4, dtype=torch.float64)
    assert local_linear_attention(q, k, v, ridge=1e-8, num_iterations=100).isfinite().all()
    with pytest.raises(ValueError, match="wanted positive and finite"):
        local_linear_attention(q, k, v, ridge=0.0)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_smallest_ridge_in_fp32_is_solved_to_some_percent(solver: Solver, width: int) -> None:
    inputs = make_inputs(1, 60, 2, 1, width, dtype=torch.float32)
    attend = partial(local_linear_attention, ridge=MIN_FP32_RIDGE)
    truth = output_and_gradients(partial(attend, solver="direct"), inputs.to(torch.float64))
    actual = output_and_gradients(partial(attend, solver=solver, num_iterations=200), inputs)
    for name, expected in truth.items():
        assert relative_error(actual[name], expected) < 0.05, name


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_value_of_nan_gives_nan_and_no_error(solver: Solver) -> None:
    inputs = make_inputs(1, 12, 2, 1, 4, dtype=torch.float32)
    inputs.k[0, 6, 0, 1] = math.nan
    o = local_linear_attention(inputs.q, inputs.k, inputs.v, solver=solver)
    assert o[:, 6:].isnan().all()
    gradients = output_and_gradients(partial(local_linear_attention, solver=solver), inputs)
    assert gradients["dq"][:, 6:].isnan().all()


def test_a_matrix_that_rounding_makes_indefinite_gives_nan() -> None:
    inputs = make_inputs(1, 40, 2, 1, 16, dtype=torch.float32)
    # of rank one, but for rounding, and far larger than the ridge
    k = 1e4 * inputs.k[..., :1].expand_as(inputs.k)
    o = local_linear_attention(inputs.q, k, inputs.v, ridge=MIN_FP32_RIDGE, scale=0.0, solver="direct")
    assert o.isnan().any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_empty_inputs_give_empty_results(solver: Solver) -> None:
    q, _, k, v, _ = make_inputs(1, 0, 2, 1, 4, dtype=torch.float32)
    assert local_linear_attention(q, k, v, solver=solver).shape == (1, 0, 2, 4)
