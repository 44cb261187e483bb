"""The kernel of models/kernels/accumulate.py in Triton's interpreter; test_accumulate.py runs this file."""

import os

import pytest
import torch

from models.kernels import accumulate

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_accumulate.py"


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2048,), (31, 67, 3), (0,)], ids=str)
def test_sums_are_those_of_pytorch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(accumulate, "serves", lambda *tensors: launched.append(tensors) or True)
    # the elements behind the tensors, which have to stay as they are
    around = torch.randn(torch.Size(shape).numel() + 4096)
    x = torch.randn(shape).half()
    expected = around.clone()
    expected[: x.numel()] += x.flatten()
    accumulate.accumulate_(around[: x.numel()].view(shape), x)
    assert launched
    assert torch.equal(around, expected)
