"""The table of a plan's members: state, progress, held-out loss, time left."""

import shutil
import statistics
import sys
from collections import Counter

from data.progress import format_duration, format_progress
from training.sweep.overview import Overview, Status
from training.sweep.plan import Plan

# of a table that is too long for the screen, these come first
_ORDER = ("running", "refused", "failed", "stopped", "waiting", "blocked", "finished")
_CLEAR_BELOW = "\x1b[J"


def format_table(plan: Plan, overview: Overview, num_slots: int, height: int | None = None) -> str:
    """Format the table, the choices and a line of counts.

    Args:
        plan: The plan.
        overview: Its members.
        num_slots: Members that run at a time, for the time left.
        height: Number of lines; None for as many as there are.
    """
    own = overview.own
    footer = [*_choice_lines(plan, overview), _counts(overview, num_slots)]
    shown = own
    if height is not None and len(own) + len(footer) + 1 > height:
        first = sorted(own, key=lambda status: _ORDER.index(status.state))[: max(1, height - len(footer) - 2)]
        shown = [status for status in own if status in first]
        footer = [f"... and {len(own) - len(shown)} more", *footer]
    width = max(len(status.member.path) for status in own)
    lines = [_line(status, width) for status in shown]
    return "\n".join([f"{'no.':>4}  {'member':<{width}}  {'state':<8}  progress", *lines, *footer])


def _line(status: Status, width: int) -> str:
    progress, member = status.progress, status.member
    parts = [
        f"{member.number:>4}  {member.path:<{width}}  {status.state:<8}  "
        f"{format_progress(min(progress.step, progress.last_step), progress.last_step)} "
        f"step {progress.step}/{progress.last_step}"
    ]
    if progress.loss is not None:
        parts.append(f"held-out loss {progress.loss:.4f}")
    if status.state in ("running", "stopped") and progress.seconds_left:
        parts.append(f"{format_duration(progress.seconds_left)} left")
    if status.state == "finished" and progress.note is not None:
        parts.append(progress.note)
    if status.state in ("failed", "refused"):
        parts.append(progress.failure or "" if status.state == "failed" else progress.problem or "")
    return "  ".join(parts)


def _choice_lines(plan: Plan, overview: Overview) -> list[str]:
    lines = []
    for stage in plan.stages:
        if not any(axis.tuned for axis in stage.axes):
            continue
        for choice in overview.choices.get(stage.name, []):
            values = ", ".join(f"{name} {value}" for name, value in choice.values.items())
            lines.append(f"best of {stage.name}, {choice.arm}: {values} (held-out loss {choice.loss:.4f})")
            if choice.warning is not None:
                lines.append(f"warning: {stage.name}, {choice.arm}: {choice.warning}")
    return lines


def _counts(overview: Overview, num_slots: int) -> str:
    counts = Counter(status.state for status in overview.own)
    finished = counts.pop("finished", 0)
    parts = [f"{finished} of {len(overview.own)} finished", *(f"{n} {state}" for state, n in counts.items())]
    seconds = seconds_left(overview, num_slots)
    left = f"; about {format_duration(seconds)} left" if seconds else ""
    return ", ".join(parts) + left


def seconds_left(overview: Overview, num_slots: int) -> float | None:
    """Estimate the time until all members have ended, without starts and evaluations.

    Args:
        overview: The members.
        num_slots: Members that run at a time.

    Returns:
        Seconds; None while no member has taken two steps.
    """
    step_seconds = [
        status.progress.seconds_left / (status.progress.last_step - status.progress.step)
        for status in overview.own
        if status.progress.seconds_left and status.progress.step < status.progress.last_step
    ] or [
        3600 * progress.device_hours / (progress.step - progress.first_step)
        for progress in (status.progress for status in overview.own)
        if progress.step > progress.first_step
    ]
    if not step_seconds:
        return None
    mean = statistics.fmean(step_seconds)
    left = [
        (status.progress.last_step - max(status.progress.step, status.progress.first_step)) * mean
        if status.progress.seconds_left is None
        else status.progress.seconds_left
        for status in overview.own
        if status.state in ("waiting", "running", "stopped")
    ]
    return max(sum(left) / num_slots, max(left, default=0.0))


class Display:
    """Shows the table: redrawn in a terminal, elsewhere a line per change of state.

    Args:
        plan: The plan.
        num_slots: Members that run at a time.
    """

    def __init__(self, plan: Plan, num_slots: int) -> None:
        self._plan = plan
        self._num_slots = num_slots
        self._num_lines = 0
        self._states: dict[int, str] = {}

    def show(self, overview: Overview) -> None:
        """Show what has changed."""
        if sys.stdout.isatty():
            size = shutil.get_terminal_size()
            text = format_table(self._plan, overview, self._num_slots, size.lines - 1)
            self._redraw([line[: size.columns - 1] for line in text.splitlines()])
            return
        for status in overview.own:
            if self._states.get(status.member.number, "waiting") != status.state:
                print(_line(status, 0), flush=True)
            self._states[status.member.number] = status.state

    def finish(self, overview: Overview) -> None:
        """Show the whole table."""
        if sys.stdout.isatty():
            self._redraw([])
        print(format_table(self._plan, overview, self._num_slots), flush=True)

    def _redraw(self, lines: list[str]) -> None:
        up = f"\x1b[{self._num_lines}F" if self._num_lines else ""
        print(up + _CLEAR_BELOW + "".join(f"{line}\n" for line in lines), end="", flush=True)
        self._num_lines = len(lines)
