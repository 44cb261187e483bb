"""The table of throughput, memory and time."""

from collections.abc import Sequence
from functools import partial

from eval.report.curves import drawn_runs
from eval.report.result_tables import over_seeds
from eval.report.rows import Row
from eval.report.run_records import RunRecord
from eval.report.run_values import Value, device_hours, hours, median, peak_memory
from eval.report.table import Number, Table, noted, plain


def _counts_whole_rows(run: RunRecord) -> bool:
    last = run.steps[-1]
    return last.get("mfu_percent") is not None and "mfu_whole_rows_percent" not in last


def _launches(row: Row) -> str:
    kinds = {
        f"{s['num_ranks']} x {s['device']}" for run in row.runs for s in run.own_steps if "num_ranks" in s
    }
    return ", ".join(sorted(kinds))


def _all_hours(row: Row) -> float | None:
    """Return the device-hours of all seeds; None where those of one are unknown."""
    found = [device_hours(run) for run in row.runs]
    known = [each for each in found if each is not None]
    return sum(known) if len(known) == len(found) else None


def _while_running(row: Row, value: Value, spec: str) -> Number | None:
    """Make a number of a value over the runs that a row's curves are of."""
    drawn = Row(name=row.name, runs=drawn_runs(row))
    return noted(drawn.over_seeds(value), spec, len(row.runs))


def _of_whole(row: Row, value: Value) -> Number | None:
    """Make a number of the hours of a row's finished runs."""
    return over_seeds(row, lambda run: value(run) if run.is_finished else None, ",.3f")


def cost_table(rows: Sequence[Row]) -> Table:
    """Make the table of throughput, memory and time."""
    return Table({
        "Row": [row.name for row in rows],
        "Ranks": [_launches(row) for row in rows],
        "Tokens/s": [_while_running(row, partial(median, key="tokens_per_second"), ",.0f") for row in rows],
        "MFU (%)": [_while_running(row, partial(median, key="mfu_percent"), ",.1f") for row in rows],
        "Peak memory (GiB)": [_while_running(row, peak_memory, ",.1f") for row in rows],
        "Hours per run": [_of_whole(row, hours) for row in rows],
        "Device-hours per run": [_of_whole(row, device_hours) for row in rows],
        "Device-hours, all seeds": [plain(_all_hours(row), ",.3f") for row in rows],
    })  # fmt: skip


def cost_notes(rows: Sequence[Row]) -> str:
    """Say what the numbers of the cost are."""
    notes = (
        "Throughput is the median over steps. Device-hours (GPU-hours on GPUs) are the time of training "
        "steps times ranks. They include the run that a branch started from, but not evaluations, "
        "checkpoints, and steps that were lost and repeated after a resume. Numbers per run are of finished "
        "runs, (n of m) of m; while none is finished, throughput and memory are of all. Hours of all seeds "
        "are those so far. Runs with steps that are not on record have no hours."
    )
    old = [row.name for row in rows if any(map(_counts_whole_rows, row.runs))]
    if old:
        notes += f" MFU counts every row as one document in runs of an earlier version: {'; '.join(old)}."
    return notes
