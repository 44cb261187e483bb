"""The state of every member of a plan, and the choices of its stages, from the records alone."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import UserError
from eval.report.plan_file import Choice
from training.sweep.choice import choose
from training.sweep.members import Member, Variant, stage_members
from training.sweep.plan import Plan
from training.sweep.plan_folder import PlanFolder
from training.sweep.records import Progress, Records

State = Literal["waiting", "running", "stopped", "finished", "failed", "refused", "blocked"]
"""waiting: not begun, or for an earlier stage; stopped: begun, and to be resumed; refused: its folder has
another config; blocked: its arm has no member in the earlier stage that finished."""
_ENDED = ("finished", "failed", "blocked")


@dataclass(frozen=True)
class Status:
    """A member and how far it is."""

    member: Member
    progress: Progress
    state: State


@dataclass(frozen=True)
class Overview:
    """All members of a plan.

    Attributes:
        statuses: Each member's, by number.
        choices: Name of a stage whose members have ended -> choices of its arms.
    """

    statuses: list[Status]
    choices: dict[str, list[Choice]]

    @property
    def own(self) -> list[Status]:
        """The members that are runs of their own, and not those of an earlier stage."""
        return [status for status in self.statuses if status.member.same_as is None]


class Observer:
    """Looks at a plan's folder.

    Args:
        plan: The plan.
        source: Its file.
    """

    def __init__(self, plan: Plan, source: Path) -> None:
        self.plan = plan
        self.source = source
        self.folder = PlanFolder(Path(plan.folder))
        self._records = Records()

    def look(self, running: Collection[int] = (), retried: Collection[int] = ()) -> Overview:
        """Read the records that have changed.

        Args:
            running: Members with a process of the caller.
            retried: Members that the caller launches though they have failed: not failed, but stopped.

        Raises:
            UserError: The plan, or a config in it, is wrong.
        """
        statuses: list[Status] = []
        chosen: dict[tuple[str, str], Variant] = {}
        choices: dict[str, list[Choice]] = {}
        for stage in self.plan.stages:
            earlier = [status.member for status in statuses]
            members = stage_members(self.plan, stage, self.source, earlier, chosen)
            is_open = not all(name in choices for name in stage.best_of)
            own = [self._status(member, running, retried, is_open=is_open) for member in members]
            if all(status.state in _ENDED for status in own):
                losses = {s.member.number: s.progress.loss for s in own if s.state == "finished"}
                found = choose(stage, members, {n: loss for n, loss in losses.items() if loss is not None})
                chosen |= {(stage.name, variant.arm): variant for variant, _ in found}
                choices[stage.name] = [choice for _, choice in found]
            statuses += own
        self._check_baseline(statuses)
        return Overview(statuses, choices)

    def _check_baseline(self, statuses: list[Status]) -> None:
        arms = dict.fromkeys(status.member.variant.arm for status in statuses)
        if self.plan.baseline is not None and self.plan.baseline not in arms:
            raise UserError(
                f"{self.source}: baseline: got {self.plan.baseline!r}, want one of {', '.join(arms)}"
            )

    def _status(
        self, member: Member, running: Collection[int], retried: Collection[int], *, is_open: bool
    ) -> Status:
        if not member.is_known:
            progress = Progress(last_step=member.config.training.last_step)
            return Status(member, progress, "waiting" if is_open else "blocked")
        progress = self._records.progress(self.folder.run(member), member.config)
        number = member.number if member.same_as is None else member.same_as
        state: State = "waiting" if progress.step == 0 else "stopped"
        if progress.failure is not None and number not in retried:
            state = "failed"
        if number in running or progress.is_held:
            state = "running"
        elif progress.problem is not None:
            state = "refused"
        elif progress.is_finished:
            state = "finished"
        return Status(member, progress, state)


def select(overview: Overview, numbers: Collection[int] | None) -> set[int]:
    """Return the members to work off: runs of their own.

    Args:
        overview: The plan's.
        numbers: Numbers of members; None for all.

    Raises:
        UserError: There is no member of a number.
    """
    known = {status.member.number: status.member for status in overview.statuses}
    for number in numbers or ():
        if number not in known:
            raise UserError(f"--member {number}: the plan has members 0 to {len(known) - 1}")
    members = known.values() if numbers is None else [known[number] for number in numbers]
    return {member.number if member.same_as is None else member.same_as for member in members}
