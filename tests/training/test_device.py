"""The device of a run and the products on it."""

import os

import pytest

from models.sizes import SIZES
from training import device

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.mark.parametrize(("size", "expected"), [("60m", None), ("0.6b", ":0:0"), ("1.7b", ":0:0")])
def test_products_of_large_models_have_no_workspace(
    size: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    device.choose_products(SIZES[size].width)
    assert os.environ.get(VARIABLE) == expected


def test_a_workspace_that_is_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":4096:8")
    device.choose_products(SIZES["0.6b"].width)
    assert os.environ[VARIABLE] == ":4096:8"
