"""Run a plan: start members where there is room, look at their records, choose, until all have ended."""

import os
import time
from collections.abc import Callable

from training.signals import StopRequest
from training.sweep.budget import members_in_budget
from training.sweep.members import Member
from training.sweep.overview import Observer, Overview, select
from training.sweep.processes import MemberProcess, train_command
from training.sweep.slots import Slot, slot_environment

_POLL_SECONDS = 0.2
# between two looks at the records: at least so long, and so many times what a look takes
_LOOK_SECONDS, _LOOK_SHARE = 2.0, 20.0

Show = Callable[[Overview], None]
Selection = Callable[[Overview], set[int]]


class Queue:
    """Members of a plan, run in order of priority.

    Args:
        observer: Of the plan.
        slots: Where members run.
        selection: The members whose runs to do, of an overview; all of them by default.
        show: Called with each new overview.
        writes_plan: Whether to write plan.toml: not where several processes work in one folder.

    Attributes:
        selected: Numbers of their runs, which may be of earlier stages.
        launched: Numbers of those that were started here.
    """

    def __init__(
        self,
        observer: Observer,
        slots: list[Slot],
        *,
        selection: Selection = select,
        show: Show,
        writes_plan: bool,
    ) -> None:
        self._observer = observer
        self._plan = observer.plan
        self._slots = slots
        self._show = show
        self._writes_plan = writes_plan
        self._stop = StopRequest()
        self._processes: dict[int, MemberProcess] = {}
        self.launched: set[int] = set()
        self.selected: set[int] = set()
        overview = self._look()
        self.selected = overview.runs(selection(overview))

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped the sweep."""
        return self._stop.requested

    def run(self) -> Overview:
        """Run the members.

        Returns:
            The last overview: all selected members have ended, none can be started, or a signal has stopped
            the sweep and each of its members, with a checkpoint.
        """
        self._stop.install()
        overview = self._look()
        last_look, seconds = time.monotonic(), 0.0
        while not self._stop.requested:
            if self._reap() or time.monotonic() - last_look > max(_LOOK_SECONDS, _LOOK_SHARE * seconds):
                began = time.monotonic()
                overview = self._look()
                last_look = time.monotonic()
                seconds = last_look - began
                self._show(overview)
            startable = self._startable(overview)
            if self._start(startable):
                overview = self._look()
                self._show(overview)
            if not self._processes and not startable and not self._held_elsewhere(overview):
                return overview
            time.sleep(_POLL_SECONDS)
        return self._stop_all()

    def _look(self) -> Overview:
        # what failed before this launch is tried again, once
        retried = self.selected - self.launched
        overview = self._observer.look(self._processes, retried)
        if self._writes_plan:
            members = [status.member for status in overview.statuses]
            self._observer.folder.write_plan(self._plan, members, overview.choices)
        return overview

    def _reap(self) -> bool:
        """Forget the processes that have ended; return whether there were any."""
        ended = [number for number, process in self._processes.items() if process.poll() is not None]
        for number in ended:
            del self._processes[number]
        return bool(ended)

    def _startable(self, overview: Overview) -> list[Member]:
        """Return the selected members that can be started, the first ones first."""
        priority = {stage.name: stage.priority for stage in self._plan.stages}
        members = [
            status.member
            for status in members_in_budget(self._plan, overview)
            if status.member.number in self.selected - self.launched
            and status.is_ready
            and status.state in ("waiting", "stopped")
        ]
        return sorted(members, key=lambda member: (-priority[member.stage], member.number))

    def _start(self, members: list[Member]) -> bool:
        """Start the first member if there is room: one at a time, as it changes what is left of a budget."""
        used = {process.slot for process in self._processes.values()}
        free = [slot for slot in self._slots if slot not in used]
        if not members or not free:
            return False
        member, slot, folder = members[0], free[0], self._observer.folder
        command = train_command(folder.write_config(member), self._plan.gpus_per_member)
        environment = slot_environment(os.environ, slot, len(self._slots))
        self.launched.add(member.number)
        self._processes[member.number] = MemberProcess(folder.run(member), command, slot, environment)
        return True

    def _held_elsewhere(self, overview: Overview) -> bool:
        """Return whether another process has a selected member: of a sweep that was killed, or elsewhere."""
        return any(
            status.member.number in self.selected and status.state == "running" for status in overview.own
        )

    def _stop_all(self) -> Overview:
        for process in self._processes.values():
            process.stop()
        for process in self._processes.values():
            process.wait()
        self._reap()
        return self._look()
