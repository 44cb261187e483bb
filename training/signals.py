"""SIGINT and SIGTERM ask for a checkpoint and a clean end; a second one ends the process at once.

Launchers deliver one request more than once (a terminal to the process group, SLURM to every process,
torchrun to its workers), so signals within GRACE_SECONDS of the first count as the first.
"""

import os
import signal
import time
from types import FrameType

GRACE_SECONDS = 2.0


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._first: float | None = None

    def install(self) -> None:
        """Take over SIGINT and SIGTERM of this process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > GRACE_SECONDS:
            os._exit(128 + number)

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self._first is not None
