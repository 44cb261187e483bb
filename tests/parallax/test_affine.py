"""Attention with uniform weights against its definition: values, gradients, limits, packing."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from parallax import (
    affine_linear_attention,
    affine_mesanet,
    linear_attention,
    parallax_attention,
    reference,
    value_average,
)
from parallax.affine import affine_probe
from parallax.causal_product import causal_product
from parallax.testing import CASES, Case, Inputs, cu_seqlens_of, make_inputs, relative_error


class Member(NamedTuple):
    """An attention of the family and its dense reference, both called with (q, k, v)."""

    name: str
    attend: Callable[..., Tensor]
    define: Callable[..., Tensor]


def average_values(
    average: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **arguments: Any
) -> Tensor:
    # zero gradients for q and k, and one value head per query head
    zero = 0 * (q.sum() + k.sum())
    return average(v.repeat_interleave(q.shape[2] // k.shape[2], dim=2), **arguments) + zero.to(v.dtype)


MEMBERS = [
    Member(
        "value_average",
        partial(average_values, value_average),
        partial(average_values, reference.value_average_reference),
    ),
    Member("linear", linear_attention, reference.linear_reference),
    Member("affine_linear", affine_linear_attention, reference.affine_linear_reference),
    Member(
        "affine_mesanet",
        partial(affine_mesanet, ridge=0.3, num_iterations=100),
        partial(reference.affine_mesanet_reference, ridge=0.3),
    ),
]
members = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
PLAIN_CASES = [
    *(case for case in CASES if case.window_size is None),
    Case("documents_over_chunks", 300, num_heads=4, num_kv_heads=2, documents=(70, 1, 0, 150, 64, 15)),
    Case("documents_of_a_chunk", 192, documents=(64, 128)),
]


def output_and_gradients(
    attend: Callable[..., Tensor], inputs: Inputs, **arguments: Any
) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    o = attend(*leaves, **arguments)
    gradients = torch.autograd.grad(o, leaves, inputs.do.to(o.dtype))
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *gradients), strict=True))


def cu_seqlens(case: Case) -> dict[str, Tensor | None]:
    return {"cu_seqlens": case.masking()["cu_seqlens"]}


@members
@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: case.name)
def test_output_and_gradients_equal_the_definition(case: Case, member: Member) -> None:
    inputs = case.inputs(torch.float64, layout="fused")
    actual = output_and_gradients(member.attend, inputs, **cu_seqlens(case))
    expected = output_and_gradients(member.define, inputs, **cu_seqlens(case))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)


@members
def test_gradients_equal_finite_differences(member: Member) -> None:
    case = Case("packed", 67, num_heads=2, head_dim=2, documents=(1, 3, 0, 63))
    q, _, k, v, _ = case.inputs(torch.float64)
    attend = partial(member.attend, **cu_seqlens(case))
    rows = slice(62, 67)

    def attend_at_the_chunk_boundary(*late: Tensor) -> Tensor:
        return attend(*(torch.cat((x[:, :62], y), dim=1) for x, y in zip((q, k, v), late, strict=True)))

    late = [x[:, rows].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(attend_at_the_chunk_boundary, late)


def test_affine_linear_attention_is_parallax_with_an_infinite_bandwidth() -> None:
    inputs = make_inputs(1, 150, 4, 2, 16, dtype=torch.float64)
    arguments = {"cu_seqlens": cu_seqlens_of((5, 0, 130, 15))}

    def parallax(r: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        return parallax_attention(torch.zeros_like(r), r, k, v, scale=0.0, **arguments)

    actual = output_and_gradients(affine_linear_attention, inputs, **arguments)
    expected = output_and_gradients(parallax, inputs, **arguments)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)


def test_zero_probe_and_infinite_ridge_give_the_value_average() -> None:
    q, _, k, v, _ = make_inputs(2, 100, 2, 2, 16, dtype=torch.float64)
    average = value_average(v)
    torch.testing.assert_close(affine_linear_attention(0 * q, k, v), average)
    assert torch.equal(linear_attention(0 * q, k, v), 0 * v)
    errors = [relative_error(affine_mesanet(q, k, v, ridge=ridge), average) for ridge in (1e4, 1e8, 1e12)]
    # the error is first order in 1 / ridge
    assert errors[0] / errors[1] == pytest.approx(1e4, rel=1e-2)
    assert errors[2] < 1e-11


@members
def test_packed_documents_equal_separate_calls(member: Member) -> None:
    lengths = (3, 0, 70, 1, 140)
    inputs = make_inputs(1, sum(lengths), 4, 2, 8, dtype=torch.float64)
    packed = output_and_gradients(member.attend, inputs, cu_seqlens=cu_seqlens_of(lengths))
    parts = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    separate = [output_and_gradients(member.attend, Inputs(*part)) for part in parts if part[0].shape[1]]
    for name, value in packed.items():
        expected = torch.cat([part[name] for part in separate], dim=1)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@members
def test_later_tokens_leave_earlier_outputs_bit_identical(member: Member) -> None:
    q, _, k, v, _ = make_inputs(1, 200, 2, 1, 16, dtype=torch.float32)
    before = member.attend(q, k, v)
    changed = [torch.cat((x[:, :90], 5 * x[:, 90:] + 1), dim=1) for x in (q, k, v)]
    after = member.attend(*changed)
    assert torch.equal(before[:, :90], after[:, :90])
    assert not torch.equal(before[:, 90:], after[:, 90:])


@members
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_is_only_rounding(dtype: torch.dtype, member: Member) -> None:
    inputs = make_inputs(1, 130, 4, 2, 32, dtype=dtype)
    actual = output_and_gradients(member.attend, inputs)
    truth = output_and_gradients(member.define, inputs.to(torch.float64))
    for name in truth:
        # computed in fp32: a few roundings, and in bf16 that of the result
        bound = 2e-5 + (torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0)
        assert actual[name].dtype == dtype
        assert relative_error(actual[name], truth[name]) < bound, name


@members
def test_autocast_is_disabled_in_the_products(member: Member) -> None:
    inputs = make_inputs(1, 100, 2, 1, 16, dtype=torch.float32)
    expected = output_and_gradients(member.attend, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = output_and_gradients(member.attend, inputs)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@members
def test_memory_of_the_backward_is_linear_in_the_length(member: Member) -> None:
    largest = []
    for num_tokens in (512, 1024):
        sizes: list[int] = []

        def record(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        q, _, k, v, _ = make_inputs(1, num_tokens, 2, 1, 16, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
            member.attend(q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
        largest.append(max(sizes))
    assert largest[1] <= 2 * largest[0]
    assert largest[1] <= 2 * 1024 * 17


def test_operators_pass_opcheck() -> None:
    q = torch.randn(1, 2, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 1, 9, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1] * 4 + [2] * 5)
    counts = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 5], dtype=torch.float64)[:, None]
    torch.library.opcheck(affine_probe, (q, k, ids, counts, 0.3, 8, 1e-15))
    torch.library.opcheck(causal_product, (q, k, k, ids, False))
    torch.library.opcheck(causal_product, (k, q, k, ids, True))


@members
def test_compiled_as_one_graph_equals_eager(member: Member) -> None:
    inputs = make_inputs(1, 100, 2, 1, 16, dtype=torch.float32)
    arguments = {"cu_seqlens": cu_seqlens_of((80, 20))}
    compiled = torch.compile(member.attend, fullgraph=True, backend="aot_eager")
    actual = output_and_gradients(compiled, inputs, **arguments)
    expected = output_and_gradients(member.attend, inputs, **arguments)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@members
def test_empty_inputs_give_empty_results(member: Member) -> None:
    q, _, k, v, _ = make_inputs(1, 0, 2, 1, 4, dtype=torch.float32)
    assert member.attend(q, k, v).shape == (1, 0, 2, 4)


def test_wrong_inputs_raise() -> None:
    q, _, k, v, _ = make_inputs(1, 5, 2, 1, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"ridge is -1.0, wanted at least 0.001"):
        affine_mesanet(q, k, v, ridge=-1.0)
    with pytest.raises(ValueError, match="num_iterations is 0"):
        affine_mesanet(q, k, v, num_iterations=0)
    with pytest.raises(ValueError, match=r"v has shape .*, k .*; wanted equal shapes"):
        linear_attention(q, k, v[:, :, :, :2])
    with pytest.raises(ValueError, match="cu_seqlens ends at 4"):
        affine_linear_attention(q, k, v, cu_seqlens=cu_seqlens_of((4,)))
    with pytest.raises(ValueError, match=r"v has shape \(5, 1, 4\), wanted four dimensions"):
        value_average(v[0])
    with pytest.raises(TypeError, match=r"v is torch.int64"):
        value_average(v.long())
    with pytest.raises(ValueError, match="cu_seqlens needs batch 1"):
        value_average(v.expand(2, -1, -1, -1), cu_seqlens=cu_seqlens_of((5,)))
