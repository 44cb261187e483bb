"""Replaying work on a GPU as a CUDA graph."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

# before its capture, work has to have run: kernels are compiled, workspaces allocated
_NUM_EAGER_CALLS = 3


class Replayed:
    """Work that always is the same, which a CUDA graph replays after its first calls.

    It has to run on a stream of its own, without waiting for the device; work that cannot be captured is done
    as it is, with a warning. It reads and writes tensors that stay where they are; what changes from call to
    call is in them.

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
        if self._graph is None and self._pool is not None and self._num_calls >= _NUM_EAGER_CALLS:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.replay()
            return
        self._num_calls += 1
        self._work()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Capture the work, which does not run it; None where that fails."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # "relaxed": kernels may be loaded meanwhile
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="relaxed"):
                self._work()
        except RuntimeError as error:
            self._pool = None
            warnings.warn(f"no CUDA graph, kernels are launched one by one: {error}", stacklevel=2)
            return None
        return graph
