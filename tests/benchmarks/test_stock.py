"""Stock torchtitan's model has the sizes of the config that it is compared with."""

from dataclasses import replace

import pytest
import torch

from benchmarks.stock_size import StockSize
from config import load
from models.config import SoftmaxConfig
from models.qwen3 import Qwen3
from training import device
from training.run_config import RunConfig


@pytest.fixture(scope="module")
def stock():
    device.prepare()
    from benchmarks import stock_trainer

    return stock_trainer


@pytest.mark.parametrize("path", ["0.6b_softmax_adamw", "60m_parallax_muon"])
def test_stock_model_has_the_parameters_of_our_softmax_model(stock, path):
    config = load(RunConfig, f"configs/{path}.toml", [])
    with torch.device("meta"):
        theirs = stock.train_spec(config).model_cls(stock.model_args(config))
        ours = Qwen3(replace(config.model, attention=SoftmaxConfig()))
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()["total"]
    assert stock.flops_per_token(config) == ours.num_flops_per_token(config.training.seq_len)


def test_stock_model_of_a_control_is_the_plain_size():
    plain, control = (
        load(RunConfig, f"configs/0.6b_softmax_{name}.toml", [])
        for name in ("muon", "parameter_matched_muon")
    )
    assert StockSize.of(plain) == StockSize.of(control)


def test_stock_job_is_that_of_the_run(stock, tmp_path):
    config = load(RunConfig, "configs/0.6b_parallax_muon.toml", [])
    job = stock.job_config(config, rows=4, rows_per_step=16, steps=20, folder=tmp_path)
    assert (job.training.local_batch_size, job.training.global_batch_size) == (4, 16)
    assert (job.training.seq_len, job.training.mixed_precision_param) == (4096, "bfloat16")
    assert job.compile.enable
    assert (job.optimizer.name, job.optimizer.implementation) == ("AdamW", "fused")


def test_random_rows_predict_the_next_token(stock):
    inputs, labels = next(iter(stock.RandomRows(2, 8, 100, seed=0)))
    assert inputs["input"].shape == labels.shape == (2, 8)
    assert torch.equal(inputs["input"][:, 1:], labels[:, :-1])
    assert not torch.equal(labels, next(iter(stock.RandomRows(2, 8, 100, seed=1)))[1])
