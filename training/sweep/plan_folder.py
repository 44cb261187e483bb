"""The layout of a plan's folder.

runs/PLAN/
plan.toml           members, arms and choices, for the report (eval/report/plan_file.py)
STAGE/NAME/         the run folder of a member (models/run_folder.py)
configs/STAGE/      NAME.toml: the resolved config that a member is launched with
sweep.lock          held by the sweep that runs the plan
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from config import to_toml
from disk import write_text
from eval.report.plan_file import Choice, PlanFile, PlannedRun, PlannedStage
from models.run_folder import RunFolder
from training.sweep.members import Member
from training.sweep.pairs import partner
from training.sweep.plan import Plan


@dataclass(frozen=True)
class PlanFolder:
    """The folder of a plan.

    Attributes:
        path: runs/PLAN; may not exist yet.
    """

    path: Path

    @property
    def lock_file(self) -> Path:
        """The lock of the sweep that runs the plan."""
        return self.path / "sweep.lock"

    def run(self, member: Member) -> RunFolder:
        """Return the run folder of a member."""
        return RunFolder(self.path / member.path)

    def config_file(self, member: Member) -> Path:
        """Return the file with the config that a member is launched with."""
        return self.path / "configs" / f"{member.path}.toml"

    def write_config(self, member: Member) -> Path:
        """Write the config that a member is launched with, unless it is there; return its path."""
        text, path = to_toml(member.config), self.config_file(member)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        return path

    def write_plan(
        self, plan: Plan, members: Sequence[Member], choices: Mapping[str, Sequence[Choice]]
    ) -> None:
        """Write the members and choices for the report.

        Args:
            plan: The plan.
            members: All members.
            choices: Name of a stage -> choices.
        """
        stages = [
            PlannedStage(
                name=stage.name,
                members=[_planned(plan, each, members) for each in members if each.stage == stage.name],
                choices=list(choices.get(stage.name, ())),
            )
            for stage in plan.stages
        ]
        PlanFile(baseline=plan.baseline, stages=stages).write(self.path)


def _planned(plan: Plan, member: Member, members: Sequence[Member]) -> PlannedRun:
    other = partner(plan, member, members)
    return PlannedRun(
        number=member.number,
        run=member.path if member.is_known else None,
        compared_with=other.path if other is not None and other.is_known else None,
        config=member.variant.config_file.stem,
        arm=member.variant.arm,
        values=member.variant.values if member.is_known else {},
        seed=member.seed,
    )
