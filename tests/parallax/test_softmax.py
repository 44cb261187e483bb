"""Softmax attention, `parallax_attention(q, None, k, v)`: eager implementation and public function."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from parallax import eager, ops, parallax_attention
from parallax.reference import parallax_reference, parallax_reference_stats
from parallax.testing import (
    CASES,
    Case,
    Layout,
    assert_attention_within_budget,
    cu_seqlens_of,
    make_inputs,
    output_and_gradients,
    relative_error,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
attend_eagerly = partial(parallax_attention, impl="eager")


def case_id(case: Case) -> str:
    return case.name


def softmax_of_torch(q: Tensor, r: None, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_output_and_gradients_equal_torch_softmax_attention(impl: str) -> None:
    inputs = make_inputs(2, 111, 4, 2, 16, dtype=torch.float64).without_probes()
    actual = output_and_gradients(partial(parallax_attention, impl=impl), inputs)
    expected = output_and_gradients(softmax_of_torch, inputs)
    assert set(actual) == {"o", "dq", "dk", "dv"}
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_output_and_gradients_equal_parallax_with_zero_probes(case: Case, impl: str) -> None:
    inputs = case.inputs(torch.float64, r_scale=0.0)
    attend = partial(parallax_attention, impl=impl, **case.masking())
    actual = output_and_gradients(attend, inputs.without_probes())
    expected = output_and_gradients(attend, inputs)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


def test_gradients_equal_finite_differences() -> None:
    q, _, k, v, _ = make_inputs(1, 9, 4, 2, 3, dtype=torch.float64)
    masking = {"cu_seqlens": cu_seqlens_of((7, 2)), "window_size": 4}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_eagerly(q, None, k, v, **masking), leaves)


@pytest.mark.parametrize("layout", ["contiguous", "fused", "heads_first"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_output_and_gradients_equal_the_reference(case: Case, layout: Layout) -> None:
    inputs = case.inputs(torch.float64, layout=layout).without_probes()
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    actual = output_and_gradients(attend_eagerly, inputs, **case.masking())
    torch.use_deterministic_algorithms(False)
    expected = output_and_gradients(parallax_reference, inputs, **case.masking())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_log_sum_exp_equals_the_reference(case: Case) -> None:
    q, _, k, v, _ = case.inputs(torch.float64)
    masking = case.masking()
    scale = case.head_dim**-0.5
    o, lse, tbar = eager.forward(q, None, k, v, masking["cu_seqlens"], scale, case.window_size, 16)
    expected = parallax_reference_stats(q, None, k, v, **masking)
    torch.testing.assert_close(lse, expected.lse)
    assert tbar.numel() == 0
    assert torch.equal(expected.o, expected.vbar)
    assert not expected.tbar.any()
    torch.testing.assert_close(o, expected.o)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_within_the_budget(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device).without_probes()
    assert_attention_within_budget(attend_eagerly, inputs, **case.masking(device))


@pytest.mark.parametrize("key_offset", [0.0, 3.0, 8.0])
def test_bf16_error_does_not_grow_with_a_common_part_of_the_keys(key_offset: float) -> None:
    inputs = make_inputs(1, 256, 4, 2, 128, dtype=torch.bfloat16, key_offset=key_offset).without_probes()
    actual = output_and_gradients(attend_eagerly, inputs)
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
    errors = {name: relative_error(actual[name], truth[name]) for name in truth}
    assert max(errors.values()) <= 0.0032, errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_row_with_one_visible_key_returns_its_value_exactly(dtype: torch.dtype) -> None:
    q, _, k, v, _ = make_inputs(1, 70, 4, 2, 16, dtype=dtype)
    values = v.repeat_interleave(2, dim=2)
    packed = attend_eagerly(q, None, k, v, cu_seqlens=cu_seqlens_of((1, 39, 30)))
    assert torch.equal(packed[:, [0, 1, 40]], values[:, [0, 1, 40]])
    assert torch.equal(attend_eagerly(q, None, k, v, window_size=1), values)


@pytest.mark.parametrize("shape", [(1, 0), (0, 7)], ids=["no_tokens", "no_rows"])
def test_empty_inputs_give_empty_results(shape: tuple[int, int]) -> None:
    inputs = make_inputs(*shape, 4, 2, 16, dtype=torch.float32).without_probes()
    for name, x in output_and_gradients(parallax_attention, inputs).items():
        assert x.numel() == 0, name


def test_wrong_probe_shape_raises() -> None:
    q, r, k, v, _ = make_inputs(1, 8, 4, 2, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="r has shape"):
        parallax_attention(q, r[:, :, :2], k, v)
    with pytest.raises(ValueError, match="k has 7 tokens, q 8"):
        parallax_attention(q, None, k[:, :7], v[:, :7])


@pytest.mark.parametrize("masking", [(None, None), (cu_seqlens_of((3, 0, 6)), 2)], ids=["rows", "packed"])
def test_operators_pass_opcheck(masking: tuple) -> None:
    q, _, k, v, do = make_inputs(1, 9, 4, 2, 16, dtype=torch.float32, layout="fused")
    cu_seqlens, window_size = masking
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = (cu_seqlens, 0.25, window_size, 4)
    torch.library.opcheck(ops.eager_forward, (leaves[0], None, *leaves[1:], *options))
    q, k, v = (x.detach() for x in leaves)
    _, lse, tbar = ops.eager_forward(q, None, k, v, *options)
    torch.library.opcheck(ops.eager_backward, (do, q, None, k, v, lse, tbar, *options))


@pytest.fixture
def compiled() -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(parallax_attention, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_compiled_gradients_equal_uncompiled(case: Case, compiled: Callable[..., Tensor]) -> None:
    inputs = case.inputs(torch.float32, layout="heads_first").without_probes()
    actual = output_and_gradients(compiled, inputs, **case.masking())
    expected = output_and_gradients(parallax_attention, inputs, **case.masking())
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


class _RecordedOperators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_backward_is_one_operator_without_zero_fills() -> None:
    q, _, k, v, do = make_inputs(1, 8, 4, 2, 16, dtype=torch.float32)
    o = parallax_attention(q.requires_grad_(), None, k, v)
    with _RecordedOperators() as calls:
        torch.autograd.grad(o, q, do)
    assert [name for name in calls.names if "detach" not in name] == ["parallax::eager_backward"], calls.names


def test_activation_checkpointing_leaves_gradients_bit_identical() -> None:
    inputs = make_inputs(1, 40, 4, 2, 16, dtype=torch.float32).without_probes()
    expected = output_and_gradients(parallax_attention, inputs)
    actual = output_and_gradients(partial(checkpoint, parallax_attention, use_reentrant=False), inputs)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_autocast_casts_inputs_that_differ() -> None:
    inputs = make_inputs(1, 40, 4, 2, 16, dtype=torch.float32).without_probes()
    expected = output_and_gradients(parallax_attention, inputs.to(torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = inputs._replace(v=inputs.v.bfloat16(), do=inputs.do.bfloat16())
        actual = output_and_gradients(parallax_attention, mixed)
    for name in expected:
        assert torch.equal(actual[name].bfloat16(), expected[name]), name


def test_meta_tensors_give_shapes() -> None:
    q, _, k, v, _ = make_inputs(1, 8, 4, 2, 16, dtype=torch.bfloat16)
    assert parallax_attention(q.to("meta"), None, k.to("meta"), v.to("meta")).shape == q.shape
