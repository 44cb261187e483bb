"""The state of every member of a plan, and the choices of its stages, from the records alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import UserError
from eval.report.plan_file import Choice
from models.run_folder import RunFolder, is_whole
from training.sweep.choice import choose
from training.sweep.members import Member, Variant, stage_members
from training.sweep.pairs import check_pairs
from training.sweep.plan import Plan, PlanSource
from training.sweep.plan_folder import PlanFolder
from training.sweep.records import Progress, Records

State = Literal["waiting", "running", "stopped", "finished", "failed", "refused", "blocked"]
"""waiting: not begun, or for an earlier stage; stopped: begun, and to be resumed; refused: its folder has
another config; blocked: its arm has no member in the earlier stage that finished, or the member that it
branches from has failed."""
_ENDED = ("finished", "failed", "blocked")


@dataclass(frozen=True)
class Status:
    """A member and how far it is.

    Attributes:
        member: The member.
        progress: How far it is.
        state: Its state.
        has_start: Whether what it starts from is here: the checkpoint of the member that it branches from.
    """

    member: Member
    progress: Progress
    state: State
    has_start: bool = True

    @property
    def is_ready(self) -> bool:
        """Whether it can be launched, unless it runs, has ended or is refused."""
        return self.member.is_known and self.has_start


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

    def runs(self, numbers: Collection[int]) -> set[int]:
        """Return the numbers of the runs that members are: their own, or those of earlier stages."""
        return {self.statuses[number].member.run_number for number in numbers}


class Observer:
    """Looks at a plan's folder.

    Args:
        plan: The plan.
        source: Where its keys were set.

    Raises:
        UserError: The plan's folder is that of a run.
    """

    def __init__(self, plan: Plan, source: PlanSource) -> None:
        if RunFolder(Path(plan.folder)).config_file.exists():
            origin = source.of("folder")
            raise UserError(f"{origin}: folder {plan.folder} is that of a run; give the plan another folder")
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
            states = {status.member.number: status.state for status in statuses}
            own = [self._status(member, running, retried, states, is_open=is_open) for member in members]
            if all(status.state in _ENDED for status in own):
                losses = {s.member.number: s.progress.loss for s in own if s.state == "finished"}
                found = choose(stage, members, {n: loss for n, loss in losses.items() if loss is not None})
                chosen |= {(stage.name, variant.arm): variant for variant, _ in found}
                choices[stage.name] = [choice for _, choice in found]
            statuses += own
        self._check_baseline(statuses)
        check_pairs(self.plan, self.source, [status.member for status in statuses])
        return Overview(statuses, choices)

    def _check_baseline(self, statuses: list[Status]) -> None:
        arms = dict.fromkeys(status.member.variant.arm for status in statuses)
        if self.plan.baseline is not None and self.plan.baseline not in arms:
            origin = self.source.of("baseline")
            raise UserError(f"{origin}: baseline: got {self.plan.baseline!r}, want one of {', '.join(arms)}")

    def _status(
        self,
        member: Member,
        running: Collection[int],
        retried: Collection[int],
        states: Mapping[int, State],
        *,
        is_open: bool,
    ) -> Status:
        if not member.is_known:
            progress = Progress(last_step=member.config.training.last_step)
            return Status(member, progress, "waiting" if is_open else "blocked")
        progress = self._records.progress(self.folder.run(member), member.config)
        state: State = "waiting" if progress.step == 0 else "stopped"
        if progress.failure is not None and member.run_number not in retried:
            state = "failed"
        if member.run_number in running or progress.is_held:
            state = "running"
        elif progress.problem is not None:
            state = "refused"
        elif progress.is_finished:
            state = "finished"
        has_start = self._has_start(member)
        if member.trunk is not None and not has_start and state in ("waiting", "stopped"):
            is_lost = states[member.trunk.number] in ("failed", "blocked", "refused")
            state = "blocked" if is_lost else state
        return Status(member, progress, state, has_start)

    def _has_start(self, member: Member) -> bool:
        """Return whether a branch has its checkpoint, or one of its own."""
        if member.checkpoint is None:
            return True
        return is_whole(member.checkpoint) or self.folder.run(member).newest_checkpoint() is not None


def select(
    overview: Overview,
    numbers: Collection[int] | None = None,
    stages: Collection[str] | None = None,
    seeds: Collection[int] | None = None,
) -> set[int]:
    """Return the numbers of members, of those too that are the same runs as members of earlier stages.

    Args:
        overview: The plan's.
        numbers: Numbers of members; None for all.
        stages: Names of stages; None for all.
        seeds: Seeds; None for all.

    Raises:
        UserError: There is no member of a number, a stage or a seed, or none is of all of them.
    """
    members = [status.member for status in overview.statuses]
    for option, given, known in (
        ("--member", numbers, {member.number for member in members}),
        ("--stage", stages, dict.fromkeys(member.stage for member in members)),
        ("--seed", seeds, {member.seed for member in members}),
    ):
        for value in given or ():
            if value not in known:
                some = f"0 to {len(members) - 1}" if option == "--member" else ", ".join(map(str, known))
                raise UserError(f"{option} {value}: the plan has {some}")
    found = [
        member
        for member in members
        if (numbers is None or member.number in numbers)
        and (stages is None or member.stage in stages)
        and (seeds is None or member.seed in seeds)
    ]
    if not found:
        raise UserError("--member, --stage and --seed: no member is of all of them")
    return {member.number for member in found}
