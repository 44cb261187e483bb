"""Which runs train without a workspace of cuBLAS."""

import os
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from config import load
from training import cublas
from training.micro_batches import MicroBatches
from training.preflight import build_meta_model
from training.run_config import RunConfig

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv(VARIABLE, "")  # so that it is restored
    monkeypatch.delenv(VARIABLE)


def parameters_of(config: str) -> list[torch.Tensor]:
    """Return what looks like the parameters of a config's model on a GPU."""
    model = build_meta_model(load(RunConfig, f"configs/{config}.toml"))
    found = (
        SimpleNamespace(ndim=p.ndim, shape=p.shape, is_cuda=True, device="cuda") for p in model.parameters()
    )
    return [cast(torch.Tensor, p) for p in found]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *((name, ":0:0") for name in ("0.6b_softmax_adamw", "0.6b_parallax_muon", "1.7b_parallax_muon")),
        # gates, decay rates and low ranks have small matrices
        *(
            (name, None)
            for name in ("60m_softmax_muon", "0.6b_gated-deltanet_muon", "0.6b_parallax_gate_muon")
        ),
    ],
)
def test_models_of_large_matrices_alone_have_no_workspace(config: str, expected: str | None) -> None:
    cublas.limit_workspace(parameters_of(config))
    assert os.environ.get(VARIABLE) == expected


def test_a_workspace_that_is_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":4096:8")
    cublas.limit_workspace(parameters_of("0.6b_softmax_adamw"))
    assert os.environ[VARIABLE] == ":4096:8"


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus_keep_it(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    cublas.limit_workspace(parameters_of("0.6b_softmax_adamw"))
    assert VARIABLE not in os.environ


def test_training_asks_before_its_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[torch.Tensor]] = []
    monkeypatch.setattr("training.micro_batches.limit_workspace", lambda given: asked.append([*given]))
    config = load(RunConfig, "configs/debug_parallax_muon.toml")
    model = build_meta_model(config)
    MicroBatches(model, config.training, torch.device("meta"))
    assert [len(each) for each in asked] == [len([*model.parameters()])]
