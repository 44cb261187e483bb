"""The public function: argument errors, dispatch, torch.compile, activation checkpointing and autocast."""

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from parallax import api, eager, ops, parallax_attention
from parallax.testing import CASES, Case, cu_seqlens_of, make_inputs, output_and_gradients

EMPTY = torch.empty
INT32 = torch.int32


def case_id(case: Case) -> str:
    return case.name


def call_with(**changes: object) -> Tensor:
    """Call with valid packed inputs, some of them replaced."""
    q, r, k, v, _ = make_inputs(1, 8, 4, 2, 16, dtype=torch.float32)
    arguments: dict[str, Any] = {"q": q, "r": r, "k": k, "v": v} | changes
    return parallax_attention(**arguments)


WRONG_INPUTS = [
    ("q_three_dimensions", {"q": EMPTY(1, 8, 16)}, ValueError, r"q has shape \(1, 8, 16\), wanted four dim"),
    ("r_heads", {"r": EMPTY(1, 8, 2, 16)}, ValueError, r"r has shape \(1, 8, 2, 16\), q \(1, 8, 4, 16\)"),
    ("v_tokens", {"v": EMPTY(1, 9, 2, 16)}, ValueError, r"v has shape \(1, 9, 2, 16\), k \(1, 8, 2, 16\)"),
    ("batch", {"k": EMPTY(2, 8, 2, 16), "v": EMPTY(2, 8, 2, 16)}, ValueError, "k has batch 2, q 1"),
    ("keys", {"k": EMPTY(1, 9, 2, 16), "v": EMPTY(1, 9, 2, 16)}, ValueError, "k has 9 tokens, q 8"),
    ("width", {"k": EMPTY(1, 8, 2, 8), "v": EMPTY(1, 8, 2, 8)}, ValueError, "k has head width 8, q 16"),
    (
        "heads",
        {"k": EMPTY(1, 8, 3, 16), "v": EMPTY(1, 8, 3, 16)},
        ValueError,
        r"num_heads \(4\) must be a positive multiple of num_kv_heads \(3\)",
    ),
    (
        "no_kv_heads",
        {"k": EMPTY(1, 8, 0, 16), "v": EMPTY(1, 8, 0, 16)},
        ValueError,
        r"num_heads \(4\) must be a positive multiple of num_kv_heads \(0\)",
    ),
    ("mixed", {"v": EMPTY(1, 8, 2, 16).half()}, TypeError, "v is torch.float16, q torch.float32; wanted one"),
    ("integer", {"q": EMPTY(1, 8, 4, 16).int()}, TypeError, "q is torch.int32, wanted bfloat16, float16"),
    ("devices", {"r": EMPTY(1, 8, 4, 16, device="meta")}, ValueError, "r is on meta, q on cpu; wanted one"),
    ("window", {"window_size": 0}, ValueError, "window_size is 0, wanted at least 1"),
    ("scale_nan", {"scale": math.nan}, ValueError, "scale is nan, wanted a finite factor of q.k"),
    ("scale_inf", {"scale": -math.inf, "r": None}, ValueError, "scale is -inf, wanted a finite factor"),
    (
        "cu_dtype",
        {"cu_seqlens": torch.tensor([0, 8])},
        ValueError,
        "cu_seqlens is torch.int64, wanted torch.int32",
    ),
    (
        "cu_dims",
        {"cu_seqlens": EMPTY(1, 2, dtype=INT32)},
        ValueError,
        r"cu_seqlens has shape \(1, 2\), wanted",
    ),
    ("cu_short", {"cu_seqlens": EMPTY(1, dtype=INT32)}, ValueError, r"cu_seqlens has shape \(1,\), wanted"),
    (
        "cu_device",
        {"cu_seqlens": EMPTY(2, dtype=INT32, device="meta")},
        ValueError,
        "cu_seqlens is on meta, the inputs on cpu",
    ),
    ("cu_start", {"cu_seqlens": torch.tensor([1, 8], dtype=INT32)}, ValueError, "starts at 1, wanted 0"),
    (
        "cu_order",
        {"cu_seqlens": torch.tensor([0, 6, 5, 8], dtype=INT32)},
        ValueError,
        "decreases from 6 to 5 at index 2",
    ),
    (
        "cu_end",
        {"cu_seqlens": torch.tensor([0, 7], dtype=INT32)},
        ValueError,
        "ends at 7, wanted the number of tokens 8",
    ),
    ("impl", {"impl": "flash"}, ValueError, "impl is 'flash', wanted one of 'reference', 'eager', 'triton'"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [x[1:] for x in WRONG_INPUTS], ids=[x[0] for x in WRONG_INPUTS]
)
def test_wrong_input_raises(changes: dict, error: type[Exception], message: str) -> None:
    call_with()
    with pytest.raises(error, match=message):
        call_with(**changes)


def test_packed_documents_with_a_batch_raise() -> None:
    q, r, k, v, _ = make_inputs(2, 8, 4, 2, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"cu_seqlens needs batch 1, got batch 2; flatten"):
        parallax_attention(q, r, k, v, cu_seqlens=cu_seqlens_of((8,)))


def refuse(q: Tensor, scale: float) -> str:
    return f"needs CUDA, got {q.device}"


def test_explicit_implementation_that_cannot_serve_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(api._IMPLEMENTATIONS, "triton", api._Implementation(ops.eager_attention, refuse))
    with pytest.raises(
        NotImplementedError, match="impl='triton' needs CUDA, got cpu; use one of 'reference', 'eager'"
    ):
        call_with(impl="triton")


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_triton_raises_for_a_non_positive_scale(scale: float) -> None:
    with pytest.raises(NotImplementedError, match=r"impl='triton' needs a positive scale, got .*'eager'"):
        call_with(impl="triton", scale=scale)


@pytest.mark.parametrize("is_served", [True, False])
def test_default_is_the_first_preferred_implementation_that_serves(
    monkeypatch: pytest.MonkeyPatch, is_served: bool
) -> None:
    calls: list[str] = []

    def record(name: str, *tensors: Tensor, **arguments: object) -> Tensor:
        calls.append(name)
        return tensors[0]

    kernels = api._Implementation(partial(record, "triton"), (lambda q, scale: None) if is_served else refuse)
    monkeypatch.setitem(api._IMPLEMENTATIONS, "triton", kernels)
    monkeypatch.setitem(
        api._IMPLEMENTATIONS, "eager", api._Implementation(partial(record, "eager"), lambda q, scale: None)
    )
    call_with()
    monkeypatch.setitem(api._PREFERRED, "cpu", ("triton", "eager"))
    call_with()
    assert calls == ["eager", "triton" if is_served else "eager"]


@pytest.mark.parametrize("impl", [None, "eager", "reference"])
def test_default_scale_is_one_over_the_root_of_the_head_width(impl: str | None) -> None:
    assert torch.equal(call_with(impl=impl), call_with(impl=impl, scale=0.25))
    assert not torch.allclose(call_with(impl=impl), call_with(impl=impl, scale=0.5))


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize(
    ("batch_size", "num_tokens", "documents"),
    [(1, 0, None), (1, 0, (0,)), (0, 7, None)],
    ids=["no_tokens", "no_tokens_packed", "no_rows"],
)
def test_empty_inputs_give_empty_results(
    impl: str, batch_size: int, num_tokens: int, documents: tuple[int, ...] | None
) -> None:
    inputs = make_inputs(batch_size, num_tokens, 4, 2, 16, dtype=torch.float32)
    cu_seqlens = None if documents is None else cu_seqlens_of(documents)
    results = output_and_gradients(parallax_attention, inputs, cu_seqlens=cu_seqlens, impl=impl)
    expected = zip(("o", "dq", "dr", "dk", "dv"), (inputs.q, *inputs[:4]), strict=True)
    assert all(results[name].shape == like.shape for name, like in expected)


@pytest.fixture
def compiled() -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(parallax_attention, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_compiled_gradients_equal_uncompiled(case: Case, compiled: Callable[..., Tensor]) -> None:
    # the published multi-output operator returned NaN gradients here
    inputs = case.inputs(torch.float32, layout="heads_first")
    actual = output_and_gradients(compiled, inputs, **case.masking())
    expected = output_and_gradients(parallax_attention, inputs, **case.masking())
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_compiled_model_gradients_equal_uncompiled() -> None:
    """With projections before and a loss after, the operator gets views, and lse and tbar are not used."""
    torch.compiler.reset()
    torch.manual_seed(0)
    x_BTD = torch.randn(2, 33, 24, requires_grad=True)
    weight = torch.randn((4 + 4 + 2 + 2) * 8, 24, requires_grad=True)

    def loss(x_BTD: Tensor, weight: Tensor) -> Tensor:
        heads = torch.nn.functional.linear(x_BTD, weight).unflatten(-1, (12, 8))
        return parallax_attention(*heads.split([4, 4, 2, 2], dim=2)).square().sum()

    expected = torch.autograd.grad(loss(x_BTD, weight), (x_BTD, weight))
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")(x_BTD, weight)
    actual = torch.autograd.grad(compiled_loss, (x_BTD, weight))
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_inductor_gradients_equal_uncompiled(device: str) -> None:
    torch.compiler.reset()
    inputs = make_inputs(2, 40, 4, 2, 16, dtype=torch.float32, device=device)
    inductor = torch.compile(lambda *x: parallax_attention(*x).sin(), fullgraph=True)
    actual = output_and_gradients(inductor, inputs)
    expected = output_and_gradients(lambda *x: parallax_attention(*x).sin(), inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_new_lengths_compile_once_when_shapes_are_dynamic() -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(parallax_attention, fullgraph=True, dynamic=True, backend=count)
    for num_tokens in (7, 40, 23):
        q, r, k, v, _ = make_inputs(2, num_tokens, 4, 2, 16, dtype=torch.float32)
        assert torch.equal(compiled(q, r, k, v), parallax_attention(q, r, k, v))
    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.parallax.eager_forward.default) == 1


def test_compiled_call_raises_for_wrong_document_bounds(compiled: Callable[..., Tensor]) -> None:
    q, r, k, v, _ = make_inputs(1, 8, 4, 2, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="ends at 7, wanted the number of tokens 8"):
        compiled(q, r, k, v, cu_seqlens=cu_seqlens_of((7,)))


@pytest.mark.parametrize("masking", [(None, None), (cu_seqlens_of((3, 0, 6)), 2)], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(masking: tuple, dtype: torch.dtype) -> None:
    q, r, k, v, do = make_inputs(1, 9, 4, 2, 16, dtype=dtype, layout="fused")
    cu_seqlens, window_size = masking
    leaves = [x.requires_grad_() for x in (q, r, k, v)]
    torch.library.opcheck(ops.eager_forward, (*leaves, cu_seqlens, 0.25, window_size, 4))
    plain = [x.detach() for x in leaves]
    _, lse, tbar = ops.eager_forward(*plain, cu_seqlens, 0.25, window_size, 4)
    torch.library.opcheck(ops.eager_backward, (do, *plain, lse, tbar, cu_seqlens, 0.25, window_size, 4))


def test_row_statistics_carry_no_gradient() -> None:
    q, r, k, v, _ = make_inputs(1, 9, 2, 1, 4, dtype=torch.float32)
    o, lse, tbar = ops.eager_forward(q.requires_grad_(), r, k, v, None, 0.5, None, 4)
    assert o.requires_grad
    assert not lse.requires_grad
    assert not tbar.requires_grad


class _RecordedOperators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_backward_is_one_operator_without_zero_fills() -> None:
    q, r, k, v, do = make_inputs(1, 8, 4, 2, 16, dtype=torch.float32)
    q.requires_grad_()
    o = parallax_attention(q, r, k, v)
    with _RecordedOperators() as calls:
        torch.autograd.grad(o, q, do)
    computing = [name for name in calls.names if "detach" not in name]
    assert computing == ["parallax::eager_backward"], calls.names


class _NoGradient(torch.autograd.Function):
    """The identity, whose backward returns None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> None:
        return None


def test_missing_output_gradient_gives_no_input_gradient() -> None:
    q, r, k, v, _ = make_inputs(1, 8, 4, 2, 16, dtype=torch.float32)
    q.requires_grad_()
    _NoGradient.apply(parallax_attention(q, r, k, v)).sum().backward()
    assert q.grad is None or not q.grad.any()


def test_second_derivative_raises() -> None:
    q, r, k, v, _ = make_inputs(1, 9, 2, 1, 4, dtype=torch.float32)
    o = parallax_attention(q.requires_grad_(), r, k, v)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="eager_backward"):
        dq.sum().backward()


@pytest.fixture
def num_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the runs of the eager forward."""
    count = [0]
    forward = eager.forward

    def counting(*arguments) -> tuple[Tensor, ...]:
        count[0] += 1
        return forward(*arguments)

    monkeypatch.setattr(eager, "forward", counting)
    return count


def keep_attention(_context: object, operator: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    is_attention = operator is torch.ops.parallax.eager_forward.default
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("is_selective", [False, True], ids=["full", "selective"])
def test_activation_checkpointing_leaves_gradients_bit_identical(
    num_forwards: list[int], is_selective: bool
) -> None:
    inputs = make_inputs(2, 40, 4, 2, 16, dtype=torch.float32)
    attend = lambda *x: parallax_attention(*(y.sin() for y in x)).cos()  # noqa: E731
    expected = output_and_gradients(attend, inputs)
    contexts = partial(create_selective_checkpoint_contexts, keep_attention)
    options = {"context_fn": contexts} if is_selective else {}
    num_forwards[0] = 0
    actual = output_and_gradients(partial(checkpoint, attend, use_reentrant=False, **options), inputs)
    assert num_forwards[0] == (1 if is_selective else 2)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_inputs_that_differ(compiled: Callable[..., Tensor], is_compiled: bool) -> None:
    inputs = make_inputs(1, 40, 4, 2, 16, dtype=torch.float32)
    rounded = inputs.to(torch.bfloat16)
    expected = output_and_gradients(parallax_attention, rounded)
    mixed = inputs._replace(v=rounded.v, do=rounded.do)
    attend = compiled if is_compiled else parallax_attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = output_and_gradients(attend, mixed)
    for name in expected:
        assert torch.equal(actual[name].bfloat16(), expected[name]), name
    assert actual["dq"].dtype == torch.float32


def test_autocast_is_disabled_in_the_operator() -> None:
    inputs = make_inputs(1, 40, 4, 2, 16, dtype=torch.float32)
    attend = partial(ops.eager_attention, scale=0.25)
    expected = output_and_gradients(attend, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = output_and_gradients(attend, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_fake_and_meta_tensors_give_shapes() -> None:
    q, r, k, v = (x.to("meta") for x in make_inputs(1, 8, 4, 2, 16, dtype=torch.bfloat16)[:4])
    cu_seqlens = torch.empty(3, dtype=INT32, device="meta")
    assert parallax_attention(q, r, k, v, cu_seqlens=cu_seqlens).shape == q.shape
    with FakeTensorMode():
        q, k = torch.empty(1, 8, 4, 16), torch.empty(1, 8, 2, 16)
        o = parallax_attention(q, q, k, k, cu_seqlens=torch.empty(3, dtype=INT32))
    assert o.shape == q.shape


def test_import_needs_only_torch() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
before = set(sys.modules)
import parallax
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"torch", "parallax"}))
print(sorted(name for name in sys.modules if name.startswith("parallax.kernels")))
print("torch._inductor" in set(sys.modules) - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:3] == ["[]", "[]", "False"]
