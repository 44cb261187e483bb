"""Signals, and the end of torchrun, stop a run with a checkpoint; a second SIGINT or SIGTERM exits at once.

Launchers may deliver one request several times (a terminal to the process group, SLURM to every process,
torchrun to its workers), so signals within GRACE_SECONDS of the first are ignored. SIGHUP, SIGUSR1 and
SIGUSR2 only ever ask: SLURM's SIGUSR1 before the time limit and its SIGTERM at the limit are one request.

torchrun that is killed leaves its workers running, beside those of the next launch. A parent-death signal
(prctl) would follow the thread that started the worker, not torchrun, so the parent's id is polled instead.
"""

import logging
import os
import signal
import threading
import time
from types import FrameType

from errors import RUN_ERROR_CODE

logger = logging.getLogger("parallax")

GRACE_SECONDS = 2.0
ORPHAN_SECONDS = 50.0
"""How long a worker has to finish its step and write a checkpoint once torchrun has ended."""
_POLL_SECONDS = 1.0
_INSISTING = (signal.SIGINT, signal.SIGTERM)
_ASKING = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this process is to stop: it has received a signal, or the torchrun that started it has ended.

    Create it as early as possible: the parent at that time is taken for torchrun.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._first_signal: float | None = None  # of those that insist
        # a process started from a shell outlives it
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._told_end = threading.Lock()  # held once the end of torchrun has been told

    def install(self) -> None:
        """Install the handlers; a SIGHUP that is ignored, as under nohup, stays ignored."""
        for number in (*_INSISTING, *_ASKING):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def watch_torchrun(self) -> None:
        """Watch torchrun from a thread, which ends this process ORPHAN_SECONDS after torchrun has ended.

        The thread is for a process that does not get to its next step: without torchrun other ranks may be
        missing, and a collective waits for them.
        """
        if self._torchrun is not None:
            threading.Thread(target=self._exit_after_torchrun, name="torchrun watch", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        if number in _ASKING:
            return
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
        elif now - self._first_signal > GRACE_SECONDS:
            os._exit(128 + number)

    def _exit_after_torchrun(self) -> None:
        while not self._is_orphan:
            time.sleep(_POLL_SECONDS)
        self._tell_end_of_torchrun()
        time.sleep(ORPHAN_SECONDS)
        logger.error(f"ended without a checkpoint, {ORPHAN_SECONDS:.0f} s after torchrun")
        os._exit(RUN_ERROR_CODE)

    def _tell_end_of_torchrun(self) -> None:
        """Warn once, from the thread or the training loop, whichever is first."""
        if os.environ.get("LOCAL_RANK") == "0" and self._told_end.acquire(blocking=False):
            logger.warning(
                f"torchrun (process {self._torchrun}) has ended without its workers: finishing the step and "
                f"writing a checkpoint, for {ORPHAN_SECONDS:.0f} s at most"
            )

    @property
    def _is_orphan(self) -> bool:
        return self._torchrun is not None and os.getppid() != self._torchrun

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        if self._is_orphan:
            self._tell_end_of_torchrun()
            return True
        return self._is_asked

    @property
    def cause(self) -> str:
        """Why the run stops, for "stopped ..."."""
        return "by the end of torchrun" if self._is_orphan and not self._is_asked else "by a signal"
