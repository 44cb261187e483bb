"""Run a function on several ranks, each a process of its own."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

# what takes long to import, once, for a server of which the ranks are forks: a start takes 5 s of CPU time
_PRELOADED = ["pytest", "models.qwen3", "optimizers.titan", "data.titan", "eval.scoring.scorer"]


def run_ranks(worker: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Call worker(rank, *arguments) in a process for each rank; raises what a rank raised."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    mp.start_processes(worker, args=arguments, nprocs=num_ranks, start_method="forkserver")
