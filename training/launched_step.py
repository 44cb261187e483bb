"""A step between its launch and its reading."""

from typing import Any, NamedTuple

from training.rank_sums import PendingSums


class LaunchedStep(NamedTuple):
    """An optimizer step that the device may still be computing.

    Attributes:
        step: The step.
        sums: What the device measures.
        has_spectrum: Whether it is read before the next step is launched, with the updates' singular values.
        record: What the host knows of the step, for metrics.jsonl.
    """

    step: int
    sums: PendingSums
    has_spectrum: bool
    record: dict[str, Any]
