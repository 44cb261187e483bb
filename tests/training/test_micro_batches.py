"""Micro-batches: padded document bounds, and the loss and gradients of accumulated ones."""

from dataclasses import replace

import pytest
import torch

from models.config import LocalLinearConfig, ModelConfig, ParallaxConfig
from models.init import init_weights
from models.loss import cross_entropy
from models.qwen3 import Qwen3
from training.micro_batches import MicroBatches, pad_bounds, padded_num_documents
from training.replay import graph_refusal
from training.run_config import TrainingConfig

CONFIG = ModelConfig(size="debug", vocab_size=50, rope_theta=1e4, attention=ParallaxConfig())
TRAINING = TrainingConfig(steps=1, seq_len=16, global_batch_size=4, local_batch_size=2, precision="float32")


def make_model() -> Qwen3:
    model = Qwen3(CONFIG)
    init_weights(model, 0)
    return model


def test_bounds_are_padded_to_few_lengths_with_empty_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = set()
    for num_documents in range(1, 4097, 7):
        cuts = torch.randperm(32767, generator=generator)[: num_documents - 1].sort().values + 1
        bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([32768])]).int()
        padded = pad_bounds(bounds, 32768)
        assert padded.dtype == torch.int32
        assert torch.equal(padded[: len(bounds)], bounds)
        assert bool((padded[len(bounds) :] == 32768).all())
        lengths.add(len(padded) - 1)
    assert lengths == {16, 64, 256, 1024, 4096}


def test_more_documents_than_tokens_are_left_as_they_are() -> None:
    assert padded_num_documents(7, 5) == 7
    assert padded_num_documents(5, 5) == 5


def test_micro_batches_add_up_to_the_loss_and_gradients_of_all() -> None:
    model, device = make_model(), torch.device("cpu")
    micro_batches = MicroBatches(model, TRAINING, device)
    tokens = torch.randint(0, 50, (3, 1, 32), generator=torch.Generator().manual_seed(0))
    bounds = [torch.tensor([0, *cuts, 32], dtype=torch.int32) for cuts in ([5], [16], [1, 2, 30])]
    for _ in range(2):  # the second step starts from nothing again
        micro_batches.begin_step(torch.tensor(96))
        for row, cu_seqlens in zip(tokens, bounds, strict=True):
            micro_batches.add({"input": row, "cu_seqlens": cu_seqlens}, row.roll(-1))
    loss, gradients = micro_batches.loss(), [p.grad for p in model.parameters()]
    model.zero_grad()
    expected = sum(
        cross_entropy(model(row, cu_seqlens=cu_seqlens, max_seqlen=16), row.roll(-1)) / 96
        for row, cu_seqlens in zip(tokens, bounds, strict=True)
    )
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_z_loss_is_minimized_and_is_not_part_of_the_loss_on_record() -> None:
    model, device = make_model(), torch.device("cpu")
    micro_batches = MicroBatches(model, replace(TRAINING, z_loss=0.01), device)
    tokens = torch.randint(0, 50, (2, 1, 16), generator=torch.Generator().manual_seed(0))
    micro_batches.begin_step(torch.tensor(32))
    for row in tokens:
        micro_batches.add({"input": row}, row.roll(-1))
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    logits = model(tokens.flatten(0, 1))
    loss = cross_entropy(logits, tokens.flatten(0, 1).roll(-1, 1)) / 32
    z_loss = 0.01 * (logits.logsumexp(-1) ** 2).mean()
    (loss + z_loss).backward()
    torch.testing.assert_close(micro_batches.loss(), loss.detach())
    torch.testing.assert_close(micro_batches.z_loss(), z_loss.detach())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_run_says_why_it_replays_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "need a GPU" in str(graph_refusal(make_model(), TRAINING, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention, device = ParallaxConfig(impl="eager"), torch.device("cuda", 0)
    eager = Qwen3(replace(CONFIG, attention=attention))
    assert "parallax runs without our kernels" in str(graph_refusal(eager, TRAINING, device))
    local_linear = Qwen3(replace(CONFIG, attention=LocalLinearConfig()))
    assert "attention.kind lla waits for the device" in str(graph_refusal(local_linear, TRAINING, device))
