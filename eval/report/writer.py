"""The report of runs: Markdown with tables and plots."""

from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from eval.report import plots
from eval.report.comparison import Row, find_row, incomparable, make_rows
from eval.report.run_records import read_run
from eval.report.tables import (
    cost_table,
    differences_table,
    differing_table,
    results_table,
    runs_table,
    tasks_table,
)


def write_report(
    folders: Sequence[Path], *, baseline: str | None, out: Path, allow_different: bool = False
) -> Path:
    """Write report.md and its plots.

    Args:
        folders: Run folders; those without records are named in the report.
        baseline: Name of the row that is subtracted from the others; None for no differences.
        out: Folder to write to.
        allow_different: Compare runs of different data, tokenizer or token budget; the report starts with a
            warning.

    Returns:
        The path of report.md.

    Raises:
        UserError: A folder is missing, no row has the baseline's name, or the runs are not comparable.
    """
    runs = [read_run(folder) for folder in folders]
    rows = make_rows([run for run in runs if run.steps])
    base = find_row(rows, baseline) if baseline is not None else None
    problems = incomparable(rows) if rows else []
    if problems and not allow_different:
        raise UserError(
            f"these runs are not comparable: {'; '.join(problems)}. Leave some out, or give --allow-different"
        )
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Comparison of runs", ""]
    if problems:
        lines += ["**These runs are not comparable** and were compared on request. They differ in:", ""]
        lines += [*(f"* {problem}" for problem in problems), ""]
    notes = [note for run in runs for note in run.notes]
    if notes:
        lines += ["## Notes", "", *(f"* {note}" for note in dict.fromkeys(notes)), ""]
    if rows:
        lines += ["## Runs", "", *runs_table(rows), ""]
        lines += ["## Differing config keys", "", *differing_table(rows), ""] if len(rows) > 1 else []
        lines += ["## Results", "", *results_table(rows), *tasks_table(rows), ""]
        if base is not None and len(rows) > 1:
            lines += [f"## Difference to {base.name}", "", *differences_table(rows, base), ""]
        lines += ["## Throughput and cost", "", *cost_table(rows), ""]
        lines += ["## Curves", "", *_write_curves(rows, base, out), ""]
    path = out / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _write_curves(rows: Sequence[Row], baseline: Row | None, out: Path) -> list[str]:
    """Write the plots and return the lines that show them."""
    shown: list[str] = []
    for axis, title in plots.AXES.items():
        if plots.plot_loss(rows, axis, out / f"loss_{axis}.png"):
            shown.append(f"![training loss against {title}](loss_{axis}.png)")
        else:
            shown.append(f"No run recorded its {title}.")
    if plots.plot_held_out(rows, out / "held_out.png"):
        shown.append("![held-out loss against tokens](held_out.png)")
    if baseline is not None and plots.plot_differences(rows, baseline, out / "differences.png"):
        shown.append(f"![loss minus {baseline.name}](differences.png)")
    return [
        f"Training losses are running means over 1/{plots.SMOOTHED_PART} of a run.",
        *(line for each in shown for line in ("", each)),
    ]
