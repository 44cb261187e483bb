"""The tables of what was run: seeds, size and progress of each row, and the choices in which rows differ."""

from collections.abc import Sequence

from eval.report.choices import differing_choices
from eval.report.names import format_value
from eval.report.rows import Row, tokenizer_of
from eval.report.table import Cell, Table, plain


def _seeds(row: Row) -> str:
    config = [run.config for run in row.runs]
    return ", ".join(f"{each.get('run.seed', 0)}/{each.get('data.shuffle_seed', 'none')}" for each in config)


def _progress(row: Row) -> str:
    """Describe the steps of a row's runs: "680 of 680", of several where they differ."""
    ends = (f" of {run.last_step:,}" if run.last_step is not None else "" for run in row.runs)
    found = (f"{run.steps[-1]['step']:,}{end}" for run, end in zip(row.runs, ends, strict=True))
    return "; ".join(dict.fromkeys(found))


def _of_runs(row: Row, key: str, spec: str, scale: float = 1) -> Cell:
    """Make a cell of a value of a row's last records; of all values where its runs differ, as in Steps."""
    found = [value for run in row.runs if (value := run.steps[-1].get(key)) is not None]
    shown = dict.fromkeys(format(value * scale, spec) for value in found)
    return plain(found[0] * scale, spec) if len(shown) == 1 else "; ".join(shown)


def runs_table(rows: Sequence[Row]) -> Table:
    """Make the table of the runs of each row: seeds, size, progress, FLOPs, folders."""
    parents = {run.folder.parent for row in rows for run in row.runs}
    where = f" in {min(parents)}" if len(parents) == 1 else ""
    return Table({
        "Row": [row.name for row in rows],
        "Runs": [plain(len(row.runs), "d") for row in rows],
        "Seeds (weights/order)": [_seeds(row) for row in rows],
        "Parameters (M)": [_of_runs(row, "num_parameters", ",.2f", 1e-6) for row in rows],
        "Steps": [_progress(row) for row in rows],
        "Tokens": [_of_runs(row, "tokens", ",d") for row in rows],
        "FLOPs": [_of_runs(row, "flops", ".3e") for row in rows],
        f"Folders{where}": [
            ", ".join(run.folder.name if where else str(run.folder) for run in row.runs) for row in rows
        ],
    })  # fmt: skip


def differing_table(rows: Sequence[Row]) -> Table | None:
    """Make the table of the choices in which rows differ, with their tokenizers and token budgets.

    Returns:
        The table; None where the rows differ in nothing that changes training but seeds.
    """
    found = {f"`{key}`": values for key, values in differing_choices([row.config for row in rows]).items()}
    firsts = [row.runs[0] for row in rows]
    data = {
        "Tokenizer": [tokenizer_of(run) for run in firsts],
        "Token budget": [run.budget for run in firsts],
    }
    found |= {name: values for name, values in data.items() if len({*values}) > 1}
    if not found:
        return None
    columns: dict[str, list[Cell]] = {"Row": [row.name for row in rows]}
    for heading, values in found.items():
        columns[heading] = [format_value(value) for value in values]
    return Table(columns)
