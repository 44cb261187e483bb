"""The kernels of norm and RoPE in Triton's interpreter; test_norm_rope.py runs this file."""

import os
from functools import partial

import pytest
import torch

from models.kernels import norm_rope
from parallax.testing import assert_within_budget
from tests.models.kernels.norm_rope_cases import CASES, Case, make, ours, plain, truth

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_norm_rope.py"


@pytest.fixture(autouse=True)
def kernels_serve_the_cpu_and_uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(norm_rope, "serves", lambda x: x.dtype in norm_rope.DTYPES)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype, "cpu")
    actual, expected, yardstick = (f(*inputs) for f in (ours, truth, plain))
    for name in expected:
        assert_within_budget(name, actual[name], expected[name], yardstick[name], dtype)


@pytest.mark.parametrize("name", ["x", "dy"])
def test_other_strides_change_nothing(name: str) -> None:
    x, gain, dy, rope = make(CASES[0], torch.float32, "cpu")
    expected = ours(x, gain, dy, rope)
    if name == "x":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    actual = ours(x, gain, dy, rope)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_gain_of_another_dtype_keeps_it() -> None:
    x, gain, dy, rope = make(CASES[0], torch.float16, "cpu")
    actual, expected = ours(x, gain.float(), dy, rope), ours(x, gain, dy, rope)
    assert torch.equal(actual["y"], expected["y"])
    assert actual["dgain"].dtype == torch.float32
    torch.testing.assert_close(actual["dgain"].half(), expected["dgain"])


def test_empty_heads_give_empty_results() -> None:
    x, dy = torch.empty(1, 0, 2, 64), torch.empty(1, 0, 2, 64)
    results = ours(x, torch.ones(64), dy, None)
    assert results["y"].shape == results["dx"].shape == x.shape
    assert not results["dgain"].any()


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=["rope", "no_rope"])
def test_operators_pass_opcheck(case: Case) -> None:
    x, gain, dy, rope = make(case, torch.float32, "cpu")
    table = (None, None) if rope is None else (rope.cos, rope.sin)
    check = partial(
        torch.library.opcheck, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    leaves = x.detach().requires_grad_(), gain.detach().requires_grad_()
    check(norm_rope.norm_rope_forward, (*leaves, *table, 1e-6))
    check(norm_rope.norm_rope_backward, (dy, x, gain, *table, 1e-6))
