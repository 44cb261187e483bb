"""The arms of a plan with their runs: losses over seeds, and gains over the arms they are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.report.names import format_value
from eval.report.plan_file import PlanFile, PlannedRun, PlannedStage
from eval.report.run_records import RunRecord
from eval.report.run_values import Value
from eval.report.seed_statistics import Estimate, estimate


@dataclass(frozen=True, kw_only=True)
class ArmRuns:
    """The members of a stage that differ in their seeds alone.

    Attributes:
        stage: Name of the stage.
        name: Name of the arm, with its tuned values.
        config: Name of its config file.
        values: Short name of an axis that is not tuned -> its value.
        other: Name of the arm that it is compared with; None for none.
        runs: Seed -> run, of those with training steps.
        others: Seed -> the run of that seed that it is compared with.
    """

    stage: str
    name: str
    config: str
    values: Mapping[str, Any]
    other: str | None
    runs: Mapping[int, RunRecord]
    others: Mapping[int, RunRecord]

    def over_seeds(self, value: Value) -> Estimate | None:
        """Estimate the mean of a value over the runs that have one; None where none has."""
        found = (value(run) for run in self.runs.values())
        return estimate([each for each in found if each is not None])

    def gain(self, value: Value) -> Estimate | None:
        """Estimate the mean difference of a value to the other arm, run by run of equal seeds; or None."""
        return estimate([*self._differences(value).values()])

    def change_of_gain(self, before: Value, after: Value) -> Estimate | None:
        """Estimate by how much the gain in one value differs from that in another, run by run; or None."""
        one, two = self._differences(before), self._differences(after)
        return estimate([two[seed] - one[seed] for seed in one if seed in two])

    def pairs(self) -> list[tuple[RunRecord, RunRecord]]:
        """Return each run with the one of its seed: of finished ones, or of all if no pair is finished."""
        found = [(run, self.others[seed]) for seed, run in self.runs.items() if seed in self.others]
        return [pair for pair in found if all(run.is_finished for run in pair)] or found

    def _differences(self, value: Value) -> dict[int, float]:
        pairs = (
            (seed, value(run), value(self.others[seed]))
            for seed, run in self.runs.items()
            if seed in self.others
        )
        return {seed: one - two for seed, one, two in pairs if one is not None and two is not None}


def arms_of(plan: PlanFile, stage: PlannedStage, runs: Mapping[str, RunRecord]) -> list[ArmRuns]:
    """Group the members of a stage that differ in their seeds alone.

    Args:
        plan: The plan.
        stage: One of its stages.
        runs: Path in the plan's folder -> run.

    Returns:
        The groups in the order of the plan; those none of whose runs has training steps are left out.
    """
    arm_of_run = {member.run: member.arm for each in plan.stages for member in each.members}
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for member in stage.members:
        groups.setdefault((member.arm, repr(member.values)), []).append(member)
    found = []
    for (arm, _), members in groups.items():
        started = _started({member.seed: member.run for member in members}, runs)
        others = _started({member.seed: member.compared_with for member in members}, runs)
        other = next((arm_of_run[member.compared_with] for member in members if member.compared_with), None)
        values, tuned = members[0].values, _tuned(stage, arm)
        if started:
            found.append(
                ArmRuns(
                    stage=stage.name,
                    name=", ".join([arm, *(f"{name} {format_value(values[name])}" for name in tuned)]),
                    config=members[0].config,
                    values={name: value for name, value in values.items() if name not in tuned},
                    other=other,
                    runs=started,
                    others=others,
                )
            )
    return found


def _started(paths: Mapping[int, str | None], runs: Mapping[str, RunRecord]) -> dict[int, RunRecord]:
    """Return seed -> run of those that have training steps."""
    found = {seed: runs[path] for seed, path in paths.items() if path is not None and path in runs}
    return {seed: run for seed, run in found.items() if run.steps}


def _tuned(stage: PlannedStage, arm: str) -> list[str]:
    """Return the axes on which members of an arm differ."""
    of_arm = [member.values for member in stage.members if member.arm == arm]
    return [name for name in of_arm[0] if any(each.get(name) != of_arm[0][name] for each in of_arm)]
