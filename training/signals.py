"""SIGINT and SIGTERM stop a run with a checkpoint; a second signal exits at once.

Launchers may deliver one request several times (a terminal to the process group, SLURM to every process,
torchrun to its workers), so signals within GRACE_SECONDS of the first are ignored.
"""

import os
import signal
import time
from types import FrameType

GRACE_SECONDS = 2.0


class StopRequest:
    """Whether this process has received a signal to stop."""

    def __init__(self) -> None:
        self._first_signal: float | None = None

    def install(self) -> None:
        """Install the handlers of SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
        elif now - self._first_signal > GRACE_SECONDS:
            os._exit(128 + number)

    @property
    def requested(self) -> bool:
        """Whether a signal has been received."""
        return self._first_signal is not None
