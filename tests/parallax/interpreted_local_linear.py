"""Local linear attention with the kernels in Triton's interpreter; `test_kernels.py` runs this file."""

import os

import pytest
import torch

from parallax import eager, local_linear_attention
from parallax.kernels import forward, tiles
from parallax.reference import local_linear_reference
from parallax.testing import Case, relative_error

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_kernels.py"

CASES = [
    Case("rows", 40, num_heads=2, num_kv_heads=1, batch_size=2),
    Case("packed_window", 70, num_heads=2, num_kv_heads=2, documents=(1, 30, 0, 39), window_size=20),
]


@pytest.fixture
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Let the kernels accept CPU tensors; return the dtypes that their forward is launched with."""
    launch, dtypes = forward.forward, []

    def recorded(q, *args, **kwargs):
        dtypes.append(q.dtype)
        return launch(q, *args, **kwargs)

    def refuse(*args, **kwargs):
        raise AssertionError("eager ran where the kernels serve")

    monkeypatch.setattr(tiles, "refusal", lambda q, scale: None)
    monkeypatch.setattr(forward, "forward", recorded)
    monkeypatch.setattr(eager, "forward", refuse)
    monkeypatch.setattr(eager, "backward", refuse)
    return dtypes


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients_equal_the_definition(
    case: Case, solver: str, kernels_serve: list[torch.dtype]
) -> None:
    inputs = case.inputs(torch.float16)

    def run(attend, dtype: torch.dtype, **options) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        o = attend(*leaves, ridge=4.0, **options, **case.masking())
        return [o, *torch.autograd.grad(o, leaves, inputs.do.to(dtype))]

    truth = run(local_linear_reference, torch.float64)
    for name, actual, expected in zip(
        ("o", "dq", "dk", "dv"), run(local_linear_attention, torch.float32, solver=solver), truth, strict=True
    ):
        assert relative_error(actual, expected) < 1e-5, name
    # probe, output and two in the backward; CG adds its products
    assert len(kernels_serve) == 4 if solver == "direct" else len(kernels_serve) > 10
    assert set(kernels_serve) == {torch.float32}


def test_16_bit_inputs_reach_the_kernels_in_fp32(kernels_serve: list[torch.dtype]) -> None:
    q, _, k, v, _ = Case("rows", 20).inputs(torch.float16)
    o = local_linear_attention(q, k, v)
    assert o.dtype == torch.float16
    assert set(kernels_serve) == {torch.float32}


def test_unsupported_inputs_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel ran")

    of_scale = tiles.refusal
    monkeypatch.setattr(tiles, "refusal", lambda q, scale: None if scale > 0 else of_scale(q, scale))
    monkeypatch.setattr(forward, "forward", refuse)
    q, _, k, v, _ = Case("rows", 20).inputs(torch.float32)
    assert local_linear_attention(q, k, v, scale=0.0).isfinite().all()
    monkeypatch.undo()
    monkeypatch.setattr(forward, "forward", refuse)
    assert local_linear_attention(q, k, v).isfinite().all()
