"""The kernel of models/kernels/scale.py in Triton's interpreter; test_scale.py runs this file."""

import os

import pytest
import torch

from models.kernels import scale

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_scale.py"


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float16)], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2048,), (31, 67, 3), (0,)], ids=str)
def test_products_are_those_of_pytorch(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[object, ...]] = []
    monkeypatch.setattr(scale, "serves", lambda *arguments: launched.append(arguments) or True)
    given, asked = dtypes
    x, factor = torch.randn(shape).to(given), torch.tensor(1.7)
    y = scale.scale(x, factor, asked)
    assert launched
    assert y.dtype == asked
    assert torch.equal(y, (x.float() * factor).to(asked))
