"""A step between its launch and its reading."""

from typing import Any, NamedTuple

import torch

from training.rank_sums import PendingSums

# of a step: longer ones are read at once, which costs them little, so that a signal ends the run soon
LATE_SECONDS = 2.0


def reads_late(device: torch.device, step_seconds: float) -> bool:
    """Return whether a step is read while the device computes the next one.

    Args:
        device: Device of the model; a CPU has computed a step when it is launched.
        step_seconds: Time of a step, the same on all ranks: reading may be a collective call.
    """
    return device.type != "cpu" and step_seconds < LATE_SECONDS


class LaunchedStep(NamedTuple):
    """An optimizer step that the device may still be computing.

    Attributes:
        step: The step.
        sums: What the device measures.
        has_spectrum: Whether it is read before the next step is launched, with the updates' singular values.
        data_seconds: Time that the host has waited for data.
        record: What the host knows of the step, for metrics.jsonl.
    """

    step: int
    sums: PendingSums
    has_spectrum: bool
    data_seconds: float
    record: dict[str, Any]
