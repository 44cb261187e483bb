"""Metrics of a run from anywhere in its code, in one line: `log_scalar("gate/mean", gate.mean())`.

The value goes into a buffer on its device, which the trainer sums over ranks with the step's loss, in the one
all-reduce that a step has. Within blocks that torch.compile compiles, the addition is part of the graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from errors import UserError

MAX_NAMES = 256

# rows of the buffer by name; compiled code holds them as constants
_rows: dict[str, int] = {}
_totals: torch.Tensor | None = None


def log_scalar(name: str, value: torch.Tensor | float) -> None:
    """Add a value to a metric of the training step.

    metrics.jsonl, TensorBoard and wandb get the mean over the step's calls: of all micro-batches, layers and
    ranks. Outside of a training step, such as in evaluations, nothing happens. It has no gradient and does
    not wait for the device; it costs what the value costs, and two small kernels where the code is not
    compiled. Where the forward is replayed as a CUDA graph, a number keeps its value at the capture, and a
    call that was not made then is never made: give a tensor, in every micro-batch.

    Args:
        name: Name of the metric with a group, "gate/mean", the same on all ranks; names without a slash are
            those of the run's own metrics.
        value: A scalar, of this rank alone: of a DTensor, take to_local() first.

    Raises:
        UserError: The value is no scalar or a DTensor, or there are more than MAX_NAMES names.
    """
    if _totals is None:
        return
    if isinstance(value, torch.Tensor):
        if isinstance(value, DTensor):
            raise UserError(f'log_scalar("{name}"): got a DTensor; take its to_local() first')
        if value.ndim:
            shape = list(value.shape)
            raise UserError(f'log_scalar("{name}"): got a tensor of shape {shape}, want a scalar')
        value = value.detach()
    row = _totals[_row(name)]
    row[0].add_(value)
    row[1].add_(1.0)


# called as it is, once, where a graph is traced
@torch.compiler.assume_constant_result
def _row(name: str) -> int:
    if name not in _rows and len(_rows) == MAX_NAMES:
        raise UserError(f'log_scalar("{name}"): a run has at most {MAX_NAMES} names')
    return _rows.setdefault(name, len(_rows))


class ScalarRecorder:
    """Records what log_scalar is given during training steps.

    Args:
        device: Device of the buffer, that of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.zeros(MAX_NAMES, 2, device=device)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record a step, from zero."""
        global _totals
        _totals = self._buffer.zero_()
        try:
            yield
        finally:
            _totals = None

    def totals(self) -> dict[str, torch.Tensor]:
        """Return the sum and the number of the values that this rank has logged in the step, by name.

        Returns:
            fp32 `[2]` on the device, for every name that this process has ever logged.
        """
        return {name: self._buffer[row] for name, row in _rows.items()}
