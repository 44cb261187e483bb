"""Progress of work and the time left: a moving line on a terminal, else a line per minute."""

import sys
import time
from collections.abc import Callable

_LOG_SECONDS = 60.0
_TERMINAL_SECONDS = 0.5


class Progress:
    """Tells how far the work is; short work shows nothing in a log.

    Args:
        log: Writes a line to a log; None for standard error, where a terminal gets one line that moves.
        is_on: Whether anything is shown: on one of several ranks.
    """

    def __init__(self, log: Callable[[str], object] | None = None, *, is_on: bool = True) -> None:
        self._is_on = is_on
        self._log = log
        self._is_moving = log is None and sys.stderr.isatty()
        self._seconds = _TERMINAL_SECONDS if self._is_moving else _LOG_SECONDS
        self._width = 0
        self.start("")

    def start(self, name: str) -> None:
        """Start a part of the work.

        Args:
            name: What is done, for the lines.
        """
        self._name = name
        self._started = self._shown = time.monotonic()

    def update(self, fraction: float) -> None:
        """Tell how much of the part is done.

        Args:
            fraction: From 0 to 1.
        """
        now = time.monotonic()
        if not self._is_on or now - self._shown < self._seconds:
            return
        self._shown = now
        left = ""
        if fraction > 0:
            left = f", {format_duration((now - self._started) * (1 - min(fraction, 1.0)) / fraction)} left"
        self._write(f"{self._name}  {100 * min(fraction, 1.0):.0f}%{left}")

    def close(self) -> None:
        """Clear the moving line."""
        if self._width:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)
        self._width = 0

    def _write(self, line: str) -> None:
        if self._is_moving:
            print(f"\r{line:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        elif self._log is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._log(line)


def format_duration(seconds: float) -> str:
    """Format seconds as 1d02h, 3h05m, 4m07s or 9s."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{total % 60:02}s" if minutes else f"{total}s"
