"""The report of runs: report.md, its tables as CSV, its plots as PNG and PDF."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from disk import write_text
from errors import UserError
from eval.diagnostics.families import FAMILIES
from eval.diagnostics.plots import plot_by_context, plot_family
from eval.report import plots
from eval.report.comparable import incomparable, mixed_origins
from eval.report.cost_table import cost_notes, cost_table
from eval.report.curves import SMOOTHED_PART
from eval.report.diagnostics_arms import diagnostics_arms
from eval.report.difference_tables import arms_table, differences_note, differences_table
from eval.report.gradient_peaks import FACTOR, MIN_STEPS, WINDOW
from eval.report.gradient_plot import plot_gradient_norms
from eval.report.rate_plot import plot_rates
from eval.report.result_tables import results_notes, results_table, tasks_table
from eval.report.rows import Row, find_row, make_arms, make_rows, sort_rows
from eval.report.run_records import RunRecord, find_runs, read_run
from eval.report.run_tables import differing_table, runs_table
from eval.report.styles import row_styles
from eval.report.table import Table

PLOT_NOTES = (
    "Means over seeds; bands and error bars are one standard error. Training losses are running means over "
    f"1/{SMOOTHED_PART} of a run. Color tells the attention, line style and filling the optimizer; learning "
    "rates other than the best are thin and faint. The legend of differences says how many pairs of runs "
    "of equal seeds they are over.",
    f"A peak of the gradient norm is a step of more than {FACTOR:g} times the median of the {WINDOW} steps "
    f"before it (adjacent steps are one peak; the first {MIN_STEPS} steps are not judged). A spike is what "
    "training records as one, by training.spike_ratio.",
)
"""What the plots show, in sentences."""


def write_report(
    folders: Sequence[Path], *, baseline: str | None, out: Path, allow_different: bool = False
) -> Path:
    """Write report.md, its tables and its plots.

    Args:
        folders: Run folders, and folders of run folders; runs without steps are named in the report.
        baseline: Name of a row, or name or folder of one of its runs, that is subtracted from the others;
            None for no differences.
        out: Folder to write to.
        allow_different: Compare runs of different data, tokenizer or token budget; the report starts with a
            warning.

    Returns:
        The path of report.md.

    Raises:
        UserError: A folder is missing, no run has a training step, no row has the baseline's name, or the
            runs are not comparable.
    """
    runs = [read_run(folder) for folder in find_runs(folders)]
    kept = _with_steps(runs, folders)
    rows = make_rows(kept)
    base = find_row(rows, baseline) if baseline is not None else None
    rows = sort_rows(rows, base)
    problems = incomparable(kept)
    if problems and not allow_different:
        raise UserError(
            f"these runs are not comparable: {'; '.join(problems)}. Leave some out, or give --allow-different"
        )
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Comparison of runs", ""]
    if problems:
        lines += ["**These runs are not comparable** and were compared on request. They differ in:", ""]
        lines += [*(f"* {problem}" for problem in problems), ""]
    notes = [*mixed_origins(kept), *(note for run in runs for note in run.notes)]
    if notes:
        lines += ["## Notes", "", *(f"* {note}" for note in dict.fromkeys(notes)), ""]
    lines += [*_table_lines(rows, base, out), *_plot_lines(rows, base, out)]
    path = out / "report.md"
    write_text(path, "\n".join(lines))
    return path


def write_figures(folders: Sequence[Path], *, baseline: str | None, out: Path) -> list[str]:
    """Write the plots of a report alone, as PNG, for a page that shows them.

    Args:
        folders: See write_report.
        baseline: See write_report.
        out: Folder to write to.

    Returns:
        Lines of Markdown that show them, for a page in the folder above.

    Raises:
        UserError: See write_report; incomparable runs are no error.
    """
    rows = make_rows(_with_steps([read_run(folder) for folder in find_runs(folders)], folders))
    base = find_row(rows, baseline) if baseline is not None else None
    out.mkdir(parents=True, exist_ok=True)
    drawn = _draw(sort_rows(rows, base), base, out)
    for file in drawn:
        (out / f"{file}.pdf").unlink(missing_ok=True)
    return [line for file, title in drawn.items() for line in (f"![{title}]({out.name}/{file}.png)", "")]


def _with_steps(runs: Sequence[RunRecord], folders: Sequence[Path]) -> list[RunRecord]:
    """Return the runs that have a training step; at least one."""
    found = [run for run in runs if run.steps]
    if not found:
        names = ", ".join(map(str, folders))
        empty = f"; {len(runs)} started, none finished a step" if runs else ""
        raise UserError(f"nothing to report in {names}{empty}; want run folders such as runs/NAME, or runs")
    return found


def _table_lines(rows: Sequence[Row], baseline: Row | None, out: Path) -> list[str]:
    """Write each table as CSV, and return the sections of the report with all of them."""
    name = "" if baseline is None else baseline.name
    differing = differing_table(rows)
    same = () if differing or len(rows) == 1 else ("Nothing that changes training but seeds.",)
    minus = None if baseline is None or len(rows) == 1 else differences_table(rows, baseline)
    note = () if minus is None else (differences_note(name),)
    sections: tuple[tuple[str, str, Table | None, Sequence[str]], ...] = (
        ("Runs", "runs", runs_table(rows), ()),
        ("What differs", "what_differs", differing, same),
        ("Results", "results", results_table(rows), (results_notes(rows),)),
        ("All tasks", "tasks", tasks_table(rows), ()),
        ("Best learning rates", "best_learning_rates", arms_table(make_arms(rows), baseline), ()),
        (f"Difference to {name}", "differences", minus, note),
        ("Throughput and cost", "cost", cost_table(rows), (cost_notes(rows),)),
    )
    lines: list[str] = []
    for heading, file, table, notes in sections:
        path = out / f"{file}.csv"
        if table is None:
            path.unlink(missing_ok=True)  # of an earlier report
        else:
            table.write_csv(path)
        if table is not None or notes:
            shown = table.markdown() if table is not None else []
            lines += [f"## {heading}", "", *(line for note in notes for line in (note, "")), *shown, ""]
    return lines


def _plot_lines(rows: Sequence[Row], baseline: Row | None, out: Path) -> list[str]:
    """Write the plots, and return the sections of the report that show them."""
    notes = (*PLOT_NOTES, "Each plot is also a PDF beside its PNG.")
    lines = ["## Plots", "", *(line for note in notes for line in (note, ""))]
    drawn = _draw(rows, baseline, out)
    return [*lines, *(line for file, title in drawn.items() for line in (f"![{title}]({file}.png)", ""))]


def _draw(rows: Sequence[Row], baseline: Row | None, out: Path) -> dict[str, str]:
    """Write the plots that the rows have values for, and return name of a file -> title."""
    styles = row_styles(rows, baseline)
    drawn: dict[str, str] = {}

    def add(file: str, title: str, draw: Callable[[Path], bool]) -> None:
        if draw(out / f"{file}.png"):
            drawn[file] = title
            return
        for ending in (".png", ".pdf"):
            (out / f"{file}{ending}").unlink(missing_ok=True)  # of an earlier report

    for axis, name in plots.AXES.items():
        add(f"loss_{axis}", f"Training loss against {name}", partial(plots.plot_loss, rows, styles, axis))
    add("held_out", "Held-out loss", partial(plots.plot_held_out, rows, styles))
    title = "Difference in loss to the baseline"
    add("differences", title, partial(plots.plot_differences, rows, styles, baseline))
    add("learning_rates", "Loss against learning rate", partial(plot_rates, make_arms(rows), styles))
    add("gradient_norm", "Gradient norm", partial(plot_gradient_norms, rows, styles))
    arms = diagnostics_arms(rows, styles)
    for family in FAMILIES:
        add(family.file, f"Diagnostics: {family.title}", partial(plot_family, arms, family))
    add("diagnostics_by_context", "Diagnostics: By context length", partial(plot_by_context, arms))
    return drawn
