"""The average of the weights: its rule by hand, ranks, resumes, and what an evaluation sees and leaves."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from models.config import ModelConfig, ParallaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3
from models.sizes import ModelSize
from training.average import WeightAverage
from training.run_config import AverageConfig

# odd numbers of rows are sharded unevenly over two ranks
CONFIG = ModelConfig(
    size="custom",
    custom_size=ModelSize(width=30, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=10, mlp_width=35),
    vocab_size=51,
    attention=ParallaxConfig(),
)
DECAY = 0.9


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 51, (2, 16), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids, labels_BT=ids.roll(-1, 1))


def expected_loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the loss of a plain model with these weights."""
    plain = Qwen3(CONFIG)
    with torch.no_grad():
        for name, parameter in plain.unwrapped_parameters().items():
            parameter.copy_(weights[name])
    return loss_of(plain)


def follow(rank: int, num_ranks: int, store: str) -> None:
    """Train on random gradients, and compare the average with one computed by hand."""
    from training import device

    device.prepare()
    from models.titan import device_mesh, parallelize

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    with torch.device("meta"):
        model = Qwen3(CONFIG)
    parallelize(
        model,
        device_mesh("cpu", 1, num_ranks),
        precision=torch.float32,
        activation_checkpointing=None,
        compile_blocks=False,
        reshard_after_forward=True,
    )
    model.materialize("cpu")
    init_weights(model, 0)
    average = WeightAverage(model, AverageConfig(decay=DECAY, start_step=1), DECAY)
    assert not average.begin(0)
    generator = torch.Generator().manual_seed(rank)
    by_hand: dict[str, torch.Tensor] = {}
    for step in range(1, 7):
        model(torch.zeros(1, 8, dtype=torch.int64), labels_BT=torch.ones(1, 8, dtype=torch.int64)).backward()
        is_skipped = step == 4
        weights = model.unwrapped_parameters()
        with torch.no_grad():
            for p in () if is_skipped else weights.values():
                shard = p.to_local() if isinstance(p, DTensor) else p
                shard.add_(0.05 * torch.randn(shard.shape, generator=generator))
        model.zero_grad()
        before = {name: whole(x) for name, x in average.state_dict().items()}
        average.update(step, is_skipped=is_skipped)
        now = {name: whole(p).double() for name, p in weights.items()}
        by_hand = (
            {n: w if step <= 1 else DECAY * by_hand[n] + (1 - DECAY) * w for n, w in now.items()}
            if (not is_skipped)
            else by_hand
        )
        found = {name: whole(x) for name, x in average.state_dict().items()}
        assert found.keys() == by_hand.keys()
        for name, x in found.items():
            torch.testing.assert_close(x.double(), by_hand[name], rtol=1e-6, atol=1e-7)
            assert not is_skipped or torch.equal(x, before[name])
        check_swap(model, average)
    if rank == 0:
        print(f"{num_ranks} ranks: the average is right", flush=True)
    dist.destroy_process_group()


def check_swap(model: Qwen3, average: WeightAverage) -> None:
    """Check that an evaluation sees the average, between two that see the weights, bit for bit."""
    weights = {name: whole(p) for name, p in model.unwrapped_parameters().items()}
    averages = {name: whole(x) for name, x in average.state_dict().items()}
    plain = loss_of(model)
    torch.testing.assert_close(plain, expected_loss(weights))
    with average.swapped_in():
        averaged = loss_of(model)
        inside = {name: whole(p) for name, p in model.unwrapped_parameters().items()}
    assert torch.equal(loss_of(model), plain)
    torch.testing.assert_close(averaged, expected_loss(averages))
    after = {name: whole(p) for name, p in model.unwrapped_parameters().items()}
    still = {name: whole(x) for name, x in average.state_dict().items()}
    for name in weights:
        assert torch.equal(inside[name], averages[name]), name
        assert torch.equal(after[name], weights[name]), name
        assert torch.equal(still[name], averages[name]), name


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_average_is_that_of_its_rule_and_an_evaluation_changes_no_bit(
    num_ranks: int, tmp_path: Path
) -> None:
    mp.spawn(follow, args=(num_ranks, str(tmp_path / "store")), nprocs=num_ranks)
