"""Which runs train without a workspace of cuBLAS."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from config import load
from training import cublas
from training.micro_batches import MicroBatches
from training.preflight import build_meta_model
from training.run_config import RunConfig

VARIABLE, OF_LT = "CUBLAS_WORKSPACE_CONFIG", "TORCH_CUBLASLT_UNIFIED_WORKSPACE"


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in (VARIABLE, OF_LT):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def on_gpu(model: nn.Module) -> nn.Module:
    """Return what looks like the model on a GPU."""
    fakes = {
        name: SimpleNamespace(ndim=p.ndim, shape=p.shape, is_cuda=True, device="cuda")
        for name, p in model.named_parameters()
    }
    return cast(nn.Module, SimpleNamespace(named_parameters=fakes.items))


def model_of(config: str) -> nn.Module:
    """Return what looks like a config's model on a GPU."""
    return on_gpu(build_meta_model(load(RunConfig, f"configs/{config}.toml")))


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
    cublas.limit_workspace(model_of(config))
    assert os.environ.get(VARIABLE) == expected
    assert os.environ.get(OF_LT) == (None if expected is None else "0")


@pytest.mark.parametrize("bias", [True, False])
def test_models_with_biases_keep_it(bias: bool) -> None:
    with torch.device("meta"):
        cublas.limit_workspace(on_gpu(nn.Sequential(nn.Linear(1024, 2048, bias=bias))))
    assert (VARIABLE in os.environ) != bias


def test_a_workspace_that_is_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":4096:8")
    cublas.limit_workspace(model_of("0.6b_softmax_adamw"))
    assert os.environ[VARIABLE] == ":4096:8"


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus_keep_it(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    cublas.limit_workspace(model_of("0.6b_softmax_adamw"))
    assert VARIABLE not in os.environ


def test_training_asks_before_its_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr("training.micro_batches.limit_workspace", asked.append)
    config = load(RunConfig, "configs/debug_parallax_muon.toml")
    model = build_meta_model(config)
    MicroBatches(model, config.training, torch.device("meta"))
    assert asked == [model]


@pytest.mark.gpu
def test_cublaslt_works_beside_it() -> None:
    program = """
import torch
x, weight, bias = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((64, 128), (256, 128), (256,)))
y = torch.nn.functional.linear(x, weight, bias)
torch.testing.assert_close(y, x @ weight.T + bias, atol=0.2, rtol=0.02)
"""
    environment = {**os.environ, VARIABLE: ":0:0", OF_LT: "0"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
