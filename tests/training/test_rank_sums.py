"""Sums over ranks, with scalars that only some ranks have logged."""

import multiprocessing
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from errors import UserError
from training.rank_sums import RankSums
from training.trainer import StepResult, Trainer


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
    for logged, means in steps:
        got = sums.sum(values, logged)
        assert got == (expected, means), (rank, got)
        assert [*got[0]] == [*expected]
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sums_and_means_over_ranks(num_ranks: int, tmp_path: Path) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["training.rank_sums"])
    mp.start_processes(worker, args=(num_ranks, str(tmp_path)), nprocs=num_ranks, start_method="forkserver")


def test_a_logged_scalar_with_the_name_of_another_metric_is_refused() -> None:
    trainer = Mock(step=5)
    trainer.config.metrics.console_every = 10
    trainer.config.tokens_per_step = trainer.tokens = 1
    trainer.metrics_processor.progress.return_value = {"tokens": 1}
    trainer.metrics_processor.throughput.return_value = {"step_seconds": 1.0}
    trainer.dataloader.loader.skipped = {}
    metrics = {"loss": 1.0, "step_flops": 1.0}
    # those of this record, of others, and of a launch, whose keys a report gives to every record
    names = ["loss", "tokens", "step", "launch", "num_ranks", "samples", "validation_loss", "task_seconds"]
    names += ["update_rms/hidden", "update_sv_min/hidden", "tasks/mean_accuracy", "lr/gate"]
    for name in names:
        with pytest.raises(UserError, match=rf'log_scalar\("{name}"\): names without a slash, and lr/'):
            Trainer.record(trainer, StepResult(metrics, {name: 0.0}, False, False))
    Trainer.record(trainer, StepResult(metrics, {"gate/mean": 0.5}, False, False))
    _, record = trainer.metrics_processor.record.call_args.args
    assert record["loss"] == 1.0
    assert record["gate/mean"] == 0.5
