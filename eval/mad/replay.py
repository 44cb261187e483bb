"""Replaying work on a GPU as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch

# before its capture, work has to have run: kernels are compiled, workspaces allocated
_NUM_EAGER_CALLS = 3


class Replayed:
    """Work that always is the same, which a CUDA graph replays after its first calls.

    It has to run on a stream of its own, without waiting for the device. It reads and writes tensors that
    stay where they are; what changes from call to call is in them.

    Args:
        work: The work; its results are in such tensors.
        pool: Memory pool of the graphs, from torch.cuda.graph_pool_handle; None to call the work as it is.
    """

    def __init__(self, work: Callable[[], None], pool: Any) -> None:
        self._work, self._pool = work, pool
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the work once."""
        if self._graph is None and (self._pool is None or self._num_calls < _NUM_EAGER_CALLS):
            self._num_calls += 1
            self._work()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            # "thread_local": other threads of this process may use their device meanwhile
            with torch.cuda.graph(self._graph, self._pool, stream, capture_error_mode="thread_local"):
                self._work()
        self._graph.replay()
