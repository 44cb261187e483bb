"""Sums over ranks, with scalars that only some ranks have logged."""

import os
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist

from errors import UserError
from tests.ranks import run_ranks
from training.gradient_norm import StepNorm
from training.launched_step import LaunchedStep
from training.rank_sums import RankSums
from training.trainer import Trainer


def row(*values: float) -> torch.Tensor:
    return torch.tensor([sum(values), len(values)])


def worker(rank: int, num_ranks: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=num_ranks)
    sums = RankSums(torch.device("cpu"))
    values = {"loss": torch.tensor(0.5), "flops": 3.0, "flag": rank == 0}
    expected = {"loss": 0.5 * num_ranks, "flops": 3.0 * num_ranks, "flag": 1.0}
    first = (
        {"b": row(1.0, 3.0), "a": row(float(rank))} if rank == 0 else {"a": row(float(rank)), "b": row(5.0)}
    )
    steps: list[tuple[dict[str, torch.Tensor], dict[str, float]]] = [
        ({}, {}),
        (
            first,
            {"a": sum(range(num_ranks)) / num_ranks, "b": (4.0 + 5.0 * (num_ranks - 1)) / (num_ranks + 1)},
        ),
        # a name that no rank has logged in this step, and a new one on the last rank alone
        ({"a": row(), **({"c": row(7.0)} if rank == num_ranks - 1 else {})}, {"c": 7.0}),
        ({"c": row(2.0)}, {"c": 2.0}),
    ]
    same = torch.tensor([1.5, 2.5])
    for logged, means in steps:
        got = sums.read(sums.begin(values, logged, same))
        assert got == (expected, means, [1.5, 2.5]), (rank, got)
    # read one step late, with a name that is new in both steps, and rows whose memory is used again
    buffer = row(7.0)
    late = {"late": buffer} if rank == 0 else {}
    first = sums.begin(values, late, same)
    buffer.copy_(row(8.0))
    second = sums.begin(values, late, same)
    buffer.zero_()
    assert sums.read(first) == (expected, {"late": 7.0}, [1.5, 2.5])
    assert sums.read(second) == (expected, {"late": 8.0}, [1.5, 2.5])
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sums_and_means_over_ranks(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(worker, num_ranks, num_ranks, str(tmp_path))


def test_a_logged_scalar_with_the_name_of_another_metric_is_refused() -> None:
    trainer = Mock(step=5, device=torch.device("cpu"))
    trainer.config.metrics.console_every = 10
    trainer.metrics_processor.throughput.return_value = {"step_seconds": 1.0}
    trainer.gradient_norm.describe.return_value = StepNorm(1.0, 1.0, False, False)
    trainer.update_stats.metrics.return_value = {}
    sums = {
        "loss": 1.0,
        "z loss": 0.0,
        "flops": 1.0,
        "predicted tokens": 1.0,
        "finished writes": 0.0,
        "stop requests": 0.0,
        "step seconds": 0.0,
    }
    launched = LaunchedStep(5, Mock(), False, 0.0, {"tokens": 1})
    # those of this record, of others, and of a launch, whose keys a report gives to every record
    names = ["loss", "tokens", "step", "launch", "num_ranks", "samples", "validation_loss", "task_seconds"]
    names += ["update_rms/hidden", "update_sv_min/hidden", "tasks/mean_accuracy", "lr/gate"]
    with patch("training.trainer.dist.get_world_size", return_value=1):
        for name in names:
            trainer.rank_sums.read.return_value = (sums, {name: 0.0}, [])
            with pytest.raises(UserError, match=rf'log_scalar\("{name}"\): names without a slash, and lr/'):
                Trainer.read(trainer, launched)
        trainer.rank_sums.read.return_value = (sums, {"gate/mean": 0.5}, [])
        assert Trainer.read(trainer, launched) == (1.0, False)
    step, record = trainer.metrics_processor.record.call_args.args
    assert (step, record["loss"], record["gate/mean"]) == (5, 1.0, 0.5)
