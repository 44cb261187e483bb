"""Micro-batches as CUDA graphs equal the same launched one by one, bit by bit."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from models.config import ModelConfig, ParallaxConfig, SoftmaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3
from models.sizes import ModelSize
from models.titan import device_mesh, parallelize, shard
from optimizers.base import local
from training.micro_batches import MicroBatches
from training.run_config import TrainingConfig

pytestmark = pytest.mark.gpu
SIZE = ModelSize(width=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512)
T, V = 8192, 1000


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def micro_batch(num_documents: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (1, T), generator=generator)
    cuts = torch.randperm(T - 1, generator=generator)[: num_documents - 1].sort().values + 1
    bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([T])]).int()
    return {"input": tokens, "cu_seqlens": bounds}, tokens.roll(-1)


def train(
    attention: SoftmaxConfig | ParallaxConfig, *, cuda_graphs: bool, sharded: bool = False
) -> tuple[list[torch.Tensor], int]:
    """Train a few steps on one rank, or with FSDP2; return losses, gradients, weights, number of graphs."""
    device = torch.device("cuda")
    config = ModelConfig(size="custom", custom_size=SIZE, vocab_size=V, rope_theta=1e4, attention=attention)
    model = Qwen3(config).to(device)
    init_weights(model, 0)
    mesh = device_mesh("cuda", 1, 1)
    if sharded:
        for block in model.layers:
            block.compile(fullgraph=True)
        shard(model, mesh, torch.bfloat16, reshard_after_forward=True)
    else:
        parallelize(
            model, mesh, precision=torch.bfloat16, activation_checkpointing=None,
            compile_blocks=True, reshard_after_forward=True,
        )  # fmt: skip
    settings = TrainingConfig(
        steps=1, seq_len=T, global_batch_size=2, local_batch_size=1, cuda_graphs=cuda_graphs
    )
    micro_batches = MicroBatches(model, settings, device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found = []
    for step in range(10):
        micro_batches.begin_step(torch.tensor(2 * T, device=device))
        for index in range(2):
            # up to 4, 16 and 64 documents: two kinds of kernels
            micro_batches.add(*micro_batch((3, 12, 40, 9)[(step + index) % 4], seed=2 * step + index))
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        found += [micro_batches.loss(), torch.stack([g.double().norm() for g in gradients])]
        optimizer.step()
        if step % 3 == 1:
            inputs, labels = micro_batch(5, seed=0)  # an evaluation between two steps leaves weights gathered
            with torch.no_grad():
                bounds = inputs["cu_seqlens"].to(device)
                loss = model(inputs["input"].to(device), cu_seqlens=bounds, labels_BT=labels.to(device))
            found.append(loss)
    num_graphs = 0 if micro_batches._graphs is None else len(micro_batches._graphs._graphs)
    micro_batches.close()
    weights = [local(p).detach() for p in parameters]
    return [*found, *weights], num_graphs


@pytest.mark.parametrize("sharded", [False, True], ids=["one-rank", "fsdp2"])
@pytest.mark.parametrize("attention", [SoftmaxConfig(), ParallaxConfig()], ids=["softmax", "parallax"])
def test_graphs_change_no_bit_nor_does_fsdp2(
    attention: SoftmaxConfig | ParallaxConfig, sharded: bool
) -> None:
    expected, none = train(attention, cuda_graphs=False)
    found, num_graphs = train(attention, cuda_graphs=True, sharded=sharded)
    assert (none, num_graphs) == (0, 3)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_other_attentions_run_as_before() -> None:
    found, num_graphs = train(SoftmaxConfig(impl="torch"), cuda_graphs=True)
    assert num_graphs == 0
    assert all(bool(x.isfinite().all()) for x in found)
