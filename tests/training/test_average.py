"""The average of the weights: its rule by hand, ranks, resumes, and what an evaluation sees and leaves."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import config
from models.checkpoint.load import SavedWeights
from models.checkpoint.write import write_weights
from models.config import ModelConfig, ParallaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3
from models.run_folder import RunFolder
from models.sizes import ModelSize
from tests.ranks import run_ranks
from tests.training.launch import EXACT, records, train
from training.average import WeightAverage
from training.memory import checkpoint_bytes, estimate_memory
from training.preflight import build_meta_model
from training.run_config import AverageConfig, RunConfig

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
        average.update(step, is_skipped=torch.tensor(float(is_skipped)))
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
    run_ranks(follow, num_ranks, num_ranks, str(tmp_path / "store"))


def saved(folder: Path, step: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, or with the prefix "average." their average."""
    with torch.device("meta"):
        model = Qwen3(load_config(folder).model)
    tensors = {name: torch.empty(p.shape) for name, p in model.named_parameters()}
    SavedWeights(folder / "checkpoint" / f"step-{step}", average=bool(prefix)).load(tensors)
    return tensors


def load_config(folder: Path) -> RunConfig:
    table = RunFolder(folder).read_config()
    assert table is not None
    return config.from_table(RunConfig, table, "config.toml")


AVERAGE = [
    "--average.decay",
    "0.8",
    "--average.start_step",
    "2",
    "--training.steps",
    "8",
    "--eval.every",
    "4",
]
KEPT = ["--checkpoint.every", "1", "--checkpoint.keep", "none"]


@pytest.fixture(scope="module")
def averaged(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of 8 steps on 1 and on 2 ranks, with all checkpoints."""
    folders = {ranks: tmp_path_factory.mktemp(f"average{ranks}") / "run" for ranks in (1, 2)}
    for ranks, folder in folders.items():
        train("debug_parallax_muon", corpus, folder, *EXACT, *AVERAGE, *KEPT, ranks=ranks)
    return folders


def held_out(folder: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in records(folder) if name in line}


def steps(folder: Path) -> list[dict[str, Any]]:
    """Return the records of steps and evaluations, without times."""
    names = ("step", "loss", "grad_norm", "grad_norm_running", "validation_loss", "average_validation_loss")
    found = [{name: line[name] for name in names if name in line} for line in records(folder)]
    return [line for line in found if len(line) > 1]


def test_saved_averages_are_those_computed_by_hand_from_saved_weights(averaged: dict[int, Path]) -> None:
    by_hand: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        weights = {name: w.double() for name, w in saved(averaged[1], step).items()}
        by_hand = weights if step <= 2 else {n: 0.8 * by_hand[n] + 0.2 * w for n, w in weights.items()}
        for name, average in saved(averaged[1], step, "average.").items():
            torch.testing.assert_close(average.double(), by_hand[name], rtol=1e-6, atol=1e-8)
    last = saved(averaged[1], 8)
    assert all((last[name] - by_hand[name]).abs().max() > 1e-5 for name in last)


def test_one_and_two_ranks_give_the_same_average(averaged: dict[int, Path]) -> None:
    one, two = (saved(averaged[ranks], 8, "average.") for ranks in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    losses = [held_out(averaged[ranks], "average_validation_loss") for ranks in (1, 2)]
    assert losses[0].keys() == {4, 8}
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_size_of_a_checkpoint_counts_the_average(averaged: dict[int, Path]) -> None:
    for ranks, folder in averaged.items():
        run = load_config(folder)
        size = sum(file.stat().st_size for file in (folder / "checkpoint" / "step-8").iterdir())
        assert size == pytest.approx(checkpoint_bytes(run, build_meta_model(run), ranks), rel=0.02)
        without = replace(run, average=AverageConfig())
        memory, less = (estimate_memory(each, build_meta_model(each), ranks) for each in (run, without))
        num_bytes = sum(4 * p.numel() for p in build_meta_model(run).parameters())
        assert memory.peak - less.peak == pytest.approx(num_bytes / ranks)


def test_the_average_changes_nothing_else(averaged: dict[int, Path], corpus: Path, tmp_path: Path) -> None:
    without = ["--average.decay", "none", "--average.start_step", "0"]
    train("debug_parallax_muon", corpus, tmp_path / "run", *EXACT, *AVERAGE, *without)
    plain = steps(tmp_path / "run")
    ours = steps(averaged[1])
    assert {line["step"] for line in ours if "average_validation_loss" in line} == {4, 8}
    assert [{k: v for k, v in line.items() if not k.startswith("average")} for line in ours] == plain


def test_the_held_out_loss_of_the_average_is_that_of_its_weights(
    averaged: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    source, step = averaged[1], 8
    start = RunFolder(tmp_path / "start")
    average = saved(source, step, "average.")
    shapes = {name: x.shape for name, x in average.items()}
    write_weights(start.checkpoint(0), shapes, torch.float32, average.__getitem__)
    start.write_config({"model": load_config(source).model})
    words = ["--checkpoint.initial_weights", str(start.path), "--training.stop_at_step", "1"]
    train("debug_parallax_muon", corpus, tmp_path / "run", *EXACT, *words)
    expected = held_out(tmp_path / "run", "validation_loss")[0]
    assert held_out(source, "average_validation_loss")[step] == expected
    assert abs(held_out(source, "validation_loss")[step] - expected) > 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resume_is_bit_identical(
    ranks: int, averaged: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    for stop in ("5", "none"):
        words = [*EXACT, *AVERAGE, "--training.stop_at_step", stop]
        train("debug_parallax_muon", corpus, tmp_path / "run", *words, ranks=ranks)
    ours, theirs = (saved(folder, 8, "average.") for folder in (tmp_path / "run", averaged[ranks]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # a stop evaluates too
    resumed = [line for line in steps(tmp_path / "run") if line["step"] != 5 or "loss" in line]
    assert resumed == steps(averaged[ranks])


def test_a_resume_or_a_branch_switches_it_on_with_the_weights_that_it_loads(
    corpus: Path, tmp_path: Path
) -> None:
    first = [*EXACT, "--training.steps", "8", *KEPT]
    on = [*first, "--average.decay", "0.8"]
    train("debug_parallax_muon", corpus, tmp_path / "run", *first, "--training.stop_at_step", "3")
    shutil.copytree(tmp_path / "run", tmp_path / "trunk")
    trunk = str(tmp_path / "trunk" / "checkpoint" / "step-3")
    printed = [
        train("debug_parallax_muon", corpus, tmp_path / "run", *on),
        train("debug_parallax_muon", corpus, tmp_path / "branch", *on, "--checkpoint.start_from", trunk),
    ]
    for line in printed:
        assert "the average starts with the weights of step 3: no other is saved" in line
    by_hand = {name: w.double() for name, w in saved(tmp_path / "run", 3).items()}
    for step in range(4, 9):
        weights = saved(tmp_path / "run", step)
        by_hand = {name: 0.8 * x + 0.2 * weights[name].double() for name, x in by_hand.items()}
    for folder in (tmp_path / "run", tmp_path / "branch"):
        for name, average in saved(folder, 8, "average.").items():
            torch.testing.assert_close(average.double(), by_hand[name], rtol=1e-6, atol=1e-8)
