"""The tables of what was run: seeds, size and progress of each row, and the choices in which rows differ."""

from collections.abc import Sequence

from eval.report.choices import differing_choices
from eval.report.names import format_value
from eval.report.rows import Row
from eval.report.table import Cell, Table, plain


def _seeds(row: Row) -> str:
    config = [run.config for run in row.runs]
    return ", ".join(f"{each.get('run.seed', 0)}/{each.get('data.shuffle_seed', 'none')}" for each in config)


def _progress(row: Row) -> str:
    """Describe the steps of a row's runs: "680 of 680", of several where they differ."""
    ends = (f" of {run.last_step:,}" if run.last_step is not None else "" for run in row.runs)
    found = (f"{run.steps[-1]['step']:,}{end}" for run, end in zip(row.runs, ends, strict=True))
    return "; ".join(dict.fromkeys(found))


def runs_table(rows: Sequence[Row]) -> Table:
    """Make the table of the runs of each row: seeds, size, progress, FLOPs, folders."""
    last = [row.runs[0].steps[-1] for row in rows]
    parents = {run.folder.parent for row in rows for run in row.runs}
    where = f" in {min(parents)}" if len(parents) == 1 else ""
    parameters = [each.get("num_parameters") for each in last]
    return Table({
        "Row": [row.name for row in rows],
        "Runs": [plain(len(row.runs), "d") for row in rows],
        "Seeds (weights/order)": [_seeds(row) for row in rows],
        "Parameters (M)": [plain(None if n is None else n / 1e6, ",.2f") for n in parameters],
        "Steps": [_progress(row) for row in rows],
        "Tokens": [plain(each["tokens"], ",d") for each in last],
        "FLOPs": [plain(each["flops"], ".3e") for each in last],
        f"Folders{where}": [
            ", ".join(run.folder.name if where else str(run.folder) for run in row.runs) for row in rows
        ],
    })  # fmt: skip


def differing_table(rows: Sequence[Row]) -> Table | None:
    """Make the table of the choices in which rows differ; None where they differ in seeds and names only."""
    found = differing_choices([row.config for row in rows])
    if not found:
        return None
    columns: dict[str, list[Cell]] = {"Row": [row.name for row in rows]}
    for key, values in found.items():
        columns[f"`{key}`"] = [format_value(value) for value in values]
    return Table(columns)
