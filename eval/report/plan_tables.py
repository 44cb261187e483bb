"""The tables of a plan: losses and gains of the arms of a stage, and every run."""

from collections.abc import Mapping, Sequence

from eval.report.plan_file import PlanFile
from eval.report.plan_values import ArmRuns
from eval.report.run_records import RunRecord
from eval.report.run_values import (
    Value,
    average_held_out_loss,
    average_loss_before_decay,
    held_out_loss,
    loss_before_decay,
    num_missing_steps,
    own_device_hours,
    own_tokens,
)
from eval.report.table import Cell, Number, Table, noted, plain

_LOSS, _DIFFERENCE = ",.4f", "+,.4f"

ARMS_NOTE = (
    "Held-out losses in nats/token, mean ± standard error over seeds: at the last step before the decay "
    "phase (of a branch, the step that it starts from), after the last step, and there with the moving "
    "average of the weights. Differences are to the arm under Minus, run by run of equal seeds, which read "
    "the same data in the same order: ± s / sqrt(n), with the standard deviation s of n differences. No "
    "standard error where n is 1. (n of m): only n of the arm's m seeds have that loss, or a pair of it."
)


def _losses(arms: Sequence[ArmRuns], value: Value) -> list[Cell]:
    return [noted(arm.over_seeds(value), _LOSS, len(arm.runs)) for arm in arms]


def _gains(arms: Sequence[ArmRuns], value: Value) -> list[Cell]:
    return [noted(arm.gain(value), _DIFFERENCE, len(arm.runs)) for arm in arms]


def arms_table(arms: Sequence[ArmRuns]) -> Table:
    """Make the table of losses of arms, and of their differences to the arms that they are compared with.

    Args:
        arms: The arms of a stage.
    """
    changes: list[Cell] = [
        noted(arm.change_of_gain(loss_before_decay, held_out_loss), _DIFFERENCE, len(arm.runs))
        for arm in arms
    ]
    return Table({
        "Arm": [arm.name for arm in arms],
        "Seeds": [plain(len(arm.runs), "d") for arm in arms],
        "Before decay": _losses(arms, loss_before_decay),
        "End": _losses(arms, held_out_loss),
        "Average, end": _losses(arms, average_held_out_loss),
        "Minus": [arm.other for arm in arms],
        "Difference before decay": _gains(arms, loss_before_decay),
        "Difference at the end": _gains(arms, held_out_loss),
        "Change over the decay": changes,
        "Difference of averages before decay": _gains(arms, average_loss_before_decay),
        "Difference of averages at the end": _gains(arms, average_held_out_loss),
    })  # fmt: skip


def runs_table(plan: PlanFile, runs: Mapping[str, RunRecord]) -> Table:
    """Make the table of every run of a plan that has begun, each once.

    Args:
        plan: The plan.
        runs: Path in the plan's folder -> run.
    """
    members = {member.run: member for stage in reversed(plan.stages) for member in reversed(stage.members)}
    begun = [path for path, run in runs.items() if run.steps]
    found = [runs[path] for path in begun]
    return Table({
        "Run": [*begun],
        "Member": [plain(members[path].number, "d") for path in begun],
        "Steps": [_steps(run) for run in found],
        "Tokens (M)": [plain(own_tokens(run) / 1e6, ",.2f") for run in found],
        "GPU-hours": [_hours(run) for run in found],
        "Loss before decay": [plain(loss_before_decay(run), _LOSS) for run in found],
        "Loss": [plain(held_out_loss(run), _LOSS) for run in found],
        "Loss of average": [plain(average_held_out_loss(run), _LOSS) for run in found],
        "Device": [str(run.steps[-1].get("device", "")) for run in found],
        "Commit": [str(run.steps[-1].get("git_commit") or "")[:9] for run in found],
    })  # fmt: skip


def _steps(run: RunRecord) -> str:
    first = f"{run.num_trunk_steps + 1:,} to " if run.num_trunk_steps else ""
    end = "" if run.is_finished else f" of {run.last_step or 0:,}"
    return f"{first}{run.steps[-1]['step']:,}{end}"


def _hours(run: RunRecord) -> Number | None:
    """Make a number of a run's own hours, noted where they lack steps."""
    found, num_missing = own_device_hours(run), num_missing_steps(run)
    note = f"without {num_missing:,} of its steps" if num_missing else ""
    return None if found is None else Number(value=found, spec=".3f", note=note)


def totals(runs: Mapping[str, RunRecord]) -> str:
    """Say how many runs there are, with their tokens and GPU-hours."""
    begun = [run for run in runs.values() if run.steps]
    hours = [found for run in begun if (found := own_device_hours(run)) is not None]
    of_known = "" if len(hours) == len(begun) else f" ({len(hours)} of them)"
    num_missing = sum(map(num_missing_steps, begun))
    of_known += f", without {num_missing:,} steps that are not on record" if num_missing else ""
    finished = sum(run.is_finished for run in begun)
    return (
        f"{len(begun)} runs, {finished} of them finished: {sum(map(own_tokens, begun)) / 1e6:,.1f}M tokens, "
        f"{sum(hours):.2f} GPU-hours of training steps{of_known}. Members that shared a GPU count its time "
        "each; steps, tokens and hours of a branch are without those of the run that it started from."
    )
