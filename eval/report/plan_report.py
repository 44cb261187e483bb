"""The report of a plan: what is missing, the choices, and a report of each stage."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from disk import write_text
from errors import UserError
from eval.report.comparable import incomparable, mixed_origins
from eval.report.diagnostics_table import DIAGNOSTICS_NOTE, diagnostics_table
from eval.report.gain_plot import plot_gains, plot_gains_over_training
from eval.report.names import format_value
from eval.report.plan_file import Choice, PlanFile, PlannedRun, PlannedStage, read_plan
from eval.report.plan_tables import ARMS_NOTE, arms_table, runs_table, totals
from eval.report.plan_values import ArmRuns, arms_of
from eval.report.result_tables import AVERAGE, HELD_OUT
from eval.report.run_records import RunRecord, read_run
from eval.report.run_values import average_held_out_loss, held_out_loss
from eval.report.seed_statistics import estimate
from eval.report.table import Cell, Number, Table, noted, plain
from eval.report.value_plot import plot_gains_by_value
from eval.report.writer import PLOT_NOTES, write_figures, write_report


def write_plan_report(
    folder: Path, *, out: Path, figures: Sequence[str] | None = None, allow_different: bool = False
) -> Path:
    """Write report.md of a plan, and the report of each stage in a folder of its name.

    Args:
        folder: The plan's folder; its plan.toml and the members' records are read.
        out: Folder to write to.
        figures: Stages whose figures report.md shows, instead of reports of stages; None for these.
        allow_different: See write_report.

    Returns:
        The path of report.md.

    Raises:
        UserError: plan.toml is damaged, no member has a training step, or there is no such stage; see
            write_report.
    """
    plan = read_plan(folder)
    for name in figures or ():
        if name not in [stage.name for stage in plan.stages]:
            known = ", ".join(stage.name for stage in plan.stages)
            raise UserError(f"--figures {name}: the plan has the stages {known}")
    runs = _read_runs(folder, plan)
    if not any(run.steps for run in runs.values()):
        raise UserError(f"nothing to report in {folder}: no member of the plan has a training step")
    out.mkdir(parents=True, exist_ok=True)
    arms = {stage.name: arms_of(plan, stage, runs) for stage in plan.stages}
    lines = [f"# Report of the plan {folder.name}", "", totals(runs), ""]
    lines += [*_stages_table(plan, runs, out).markdown(), ""]
    drawn = partial(plot_gains, [arm for found in arms.values() for arm in found])
    lines += _shown("Gains", drawn, out, "gains.png", with_pdf=figures is None)
    notes = (ARMS_NOTE, DIAGNOSTICS_NOTE) if figures is None else (ARMS_NOTE, DIAGNOSTICS_NOTE, *PLOT_NOTES)
    lines += [line for note in notes for line in (note, "")]
    for stage in plan.stages:
        lines += [
            f"## Stage {stage.name}",
            "",
            *_choices(stage, runs, out),
            *_arms(stage.name, arms[stage.name], out),
        ]
        drawn = partial(plot_gains_by_value, arms[stage.name])
        title, file = f"Gains of {stage.name} by value", f"gains_of_{stage.name}.png"
        lines += _shown(title, drawn, out, file, with_pdf=figures is None)
        if figures is not None and stage.name not in figures:
            continue
        lines += _details(
            plan, stage, runs, out, is_page=figures is not None, allow_different=allow_different
        )
        drawn = partial(plot_gains_over_training, arms[stage.name])
        title, file = f"Gains of {stage.name} over training", f"{stage.name}/gains_over_training.png"
        lines += _shown(title, drawn, out, file, with_pdf=figures is None)
    missing = [line for stage in plan.stages for line in _missing(stage, runs)]
    lines += ["## Missing", "", *(f"* {line}" for line in missing or ["Nothing."]), ""]
    table = runs_table(plan, runs)
    table.write_csv(out / "runs.csv")
    lines += ["## Runs", "", *table.markdown(), ""]
    path = out / "report.md"
    write_text(path, "\n".join(lines))
    return path


def _arms(name: str, arms: Sequence[ArmRuns], out: Path) -> list[str]:
    """Return the table of a stage's arms, and write it; nothing where no member has a training step."""
    path = out / f"arms_of_{name}.csv"
    if not arms:
        for each in (path, out / f"diagnostics_of_{name}.csv"):
            each.unlink(missing_ok=True)  # of an earlier report
        return []
    table = arms_table(arms)
    table.write_csv(path)
    notes = mixed_origins([run for arm in arms for run in (*arm.runs.values(), *arm.others.values())])
    lines = [*table.markdown(), "", *(line for note in notes for line in (note, ""))]
    return [*lines, *_diagnostics(name, arms, out)]


def _diagnostics(name: str, arms: Sequence[ArmRuns], out: Path) -> list[str]:
    """Return the table of the diagnostics of a stage's arms, and write it; nothing where no run has any."""
    path, table = out / f"diagnostics_of_{name}.csv", diagnostics_table(arms)
    if table is None:
        path.unlink(missing_ok=True)  # of an earlier report
        return []
    table.write_csv(path)
    return [*table.markdown(), ""]


def _details(
    plan: PlanFile,
    stage: PlannedStage,
    runs: dict[str, RunRecord],
    out: Path,
    *,
    is_page: bool,
    allow_different: bool,
) -> list[str]:
    """Write the report of a stage, or for a page of the plan its figures; return the lines that show them."""
    folders = [runs[path].folder for path in _paths(stage) if path in runs and runs[path].steps]
    if not folders:
        return ["No member has a training step.", ""]
    baseline = _baseline(plan, stage, runs)
    problems = incomparable([runs[path] for path in _paths(stage) if path in runs and runs[path].steps])
    warning = [f"Its runs are comparable in pairs alone; they differ: {'; '.join(problems)}.", ""]
    if is_page:
        shown = write_figures(folders, baseline=baseline, out=out / stage.name)
        return [*(warning if problems else []), *shown]
    if problems and not allow_different:
        return [*warning, "No report of the stage: give --allow-different.", ""]
    write_report(folders, baseline=baseline, out=out / stage.name, allow_different=allow_different)
    return [f"[Report of its {len(folders)} runs]({stage.name}/report.md)", ""]


def _shown(title: str, draw: Callable[[Path], bool], out: Path, file: str, *, with_pdf: bool) -> list[str]:
    """Draw a figure, and return the lines that show it; none where there is nothing to draw."""
    path = out / file
    path.parent.mkdir(parents=True, exist_ok=True)
    is_drawn = draw(path)
    if not is_drawn:
        path.unlink(missing_ok=True)  # of an earlier report
    if not (is_drawn and with_pdf):
        path.with_suffix(".pdf").unlink(missing_ok=True)
    return [f"![{title}]({file})", ""] if is_drawn else []


def _paths(stage: PlannedStage) -> list[str]:
    return [member.run for member in stage.members if member.run is not None]


def _read_runs(folder: Path, plan: PlanFile) -> dict[str, RunRecord]:
    """Return the records of the members that have a folder, by its path in the plan's folder."""
    paths = dict.fromkeys(path for stage in plan.stages for path in _paths(stage))
    return {path: read_run(folder / path) for path in paths if (folder / path).is_dir()}


def _is_finished(member: PlannedRun, runs: dict[str, RunRecord]) -> bool:
    return member.run in runs and held_out_loss(runs[member.run]) is not None


def _stages_table(plan: PlanFile, runs: dict[str, RunRecord], out: Path) -> Table:
    finished = [sum(_is_finished(member, runs) for member in stage.members) for stage in plan.stages]
    table = Table({
        "Stage": [stage.name for stage in plan.stages],
        "Arms": [plain(len({member.arm for member in stage.members}), "d") for stage in plan.stages],
        "Members": [plain(len(stage.members), "d") for stage in plan.stages],
        "Finished": [plain(num, "d") for num in finished],
    })  # fmt: skip
    table.write_csv(out / "stages.csv")
    return table


def _missing(stage: PlannedStage, runs: dict[str, RunRecord]) -> list[str]:
    """Describe the members of a stage that have not finished."""
    return [
        f"{member.number}: {_progress(stage, member, runs)}"
        for member in stage.members
        if not _is_finished(member, runs)
    ]


def _progress(stage: PlannedStage, member: PlannedRun, runs: dict[str, RunRecord]) -> str:
    if member.run is None:
        return (
            f"{stage.name}, {member.arm}, seed {member.seed}: what it takes from another stage is not chosen"
        )
    run = runs.get(member.run)
    if run is None or not run.steps:
        return f"{member.run}: no training steps"
    if run.is_finished:
        return f"{member.run}: no held-out loss after the last step"
    return f"{member.run}: step {run.steps[-1]['step']:,} of {run.last_step or 0:,}"


def _runs_at(
    stage: PlannedStage, arm: str, values: dict[str, Any], runs: dict[str, RunRecord]
) -> list[RunRecord]:
    """Return the runs of an arm that have some values, of all seeds."""
    return [
        runs[member.run]
        for member in stage.members
        if member.arm == arm and member.run in runs and values.items() <= member.values.items()
    ]


def _average_loss(stage: PlannedStage, choice: Choice, runs: dict[str, RunRecord]) -> Number | None:
    """Make a number of the held-out loss of the averaged weights at an arm's best values, over seeds."""
    found = [average_held_out_loss(run) for run in _runs_at(stage, choice.arm, choice.values, runs)]
    mean = estimate([loss for loss in found if loss is not None])
    return None if mean is None else noted(replace(mean, error=None), AVERAGE.spec, len(found))


def _choices(stage: PlannedStage, runs: dict[str, RunRecord], out: Path) -> list[str]:
    """Return the table of the best tuned values by arm, and write it; nothing for a stage that tunes none."""
    path = out / f"best_of_{stage.name}.csv"
    chosen = [choice for choice in stage.choices if choice.values]
    if not chosen:
        path.unlink(missing_ok=True)  # of an earlier report
        return []
    names = dict.fromkeys(name for choice in chosen for name in choice.values)
    columns: dict[str, Sequence[Cell]] = {
        "Arm": [choice.arm for choice in chosen],
        **{
            f"Best {name}": [format_value(choice.values.get(name, "")) for choice in chosen] for name in names
        },
        HELD_OUT.heading: [plain(choice.loss, HELD_OUT.spec) for choice in chosen],
    }
    columns[AVERAGE.heading] = [_average_loss(stage, choice, runs) for choice in chosen]
    columns["Warning"] = [choice.warning for choice in chosen]
    table = Table({heading: list(cells) for heading, cells in columns.items()})
    table.write_csv(path)
    return [*table.markdown(), ""]


def _baseline(plan: PlanFile, stage: PlannedStage, runs: dict[str, RunRecord]) -> str | None:
    """Return the folder of a run of the baseline arm, at its best values; None where the stage has none."""
    best = next((choice.values for choice in stage.choices if choice.arm == plan.baseline), {})
    found = [
        (member, runs[member.run])
        for member in stage.members
        if member.arm == plan.baseline and member.run in runs and runs[member.run].steps
    ]
    at_best = [run for member, run in found if best.items() <= member.values.items()]
    return str((at_best or [run for _, run in found])[0].folder) if found else None
