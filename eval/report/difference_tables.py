"""The tables of differences: each row to the baseline, and each arm at its best learning rate."""

from collections.abc import Sequence

from eval.report.choices import NO_KEY
from eval.report.names import format_value
from eval.report.result_tables import AVERAGE, HELD_OUT, TRAINING, difference_cell, over_seeds, result_columns
from eval.report.rows import Arm, Row, loss_of, rate_key
from eval.report.run_values import Value, held_out_loss
from eval.report.table import Cell, Number, Table, mark_best, plain


def differences_table(rows: Sequence[Row], baseline: Row) -> Table:
    """Make the table of the differences of results, row - baseline."""
    others = [row for row in rows if row is not baseline]
    columns: dict[str, list[Cell]] = {
        "Row": [row.name for row in others],
        "Seeds of row / baseline": [f"{len(row.runs)} / {len(baseline.runs)}" for row in others],
    }
    for column in result_columns(rows):
        columns[column.heading] = [
            difference_cell(row, baseline, column.value, column.spec) for row in others
        ]
    return Table(columns)


def differences_note(baseline: str) -> str:
    """Say what the differences are."""
    return (
        f"Row minus {baseline}. Over n pairs: the mean of the differences of runs of equal seeds, which read "
        "the same data in the same order, ± s / sqrt(n), with the standard deviation s of n differences. "
        "Unpaired, as fewer than two seeds have a value in both: the difference of the means, "
        "± sqrt(s1^2/n1 + s2^2/n2). A single run has no standard error, and is paired with that of its seed."
    )


def _rate(row: Row, key: str, loss: Value) -> str:
    """Format a row's learning rate, noting where none of its runs has a loss."""
    rate = format_value(row.config.get(key, NO_KEY))
    return rate if row.over_seeds(loss) is not None else f"{rate} (no loss)"


def _best_rate(arm: Arm, key: str, loss: Value) -> Number | None:
    """Make a number of an arm's best learning rate, noting where it is at the end of those tried.

    None where no rate has a loss.
    """
    best = arm.best.config.get(key)
    if best is None or arm.best.over_seeds(loss) is None:
        return None
    rates = [row.config[key] for row in arm.rows]
    ends = {max(rates): "the largest tried", min(rates): "the smallest tried"}
    note = "the only one tried" if len({*rates}) == 1 else ends.get(best, "")
    return Number(value=best, spec="g", note=note)


def arms_table(arms: Sequence[Arm], baseline: Row | None) -> Table | None:
    """Make the table of each arm at its best learning rate.

    Args:
        arms: The arms.
        baseline: A row of the arm that is subtracted from the others, at its best learning rate too; None for
            no differences.

    Returns:
        The table; None where no arm has several learning rates.
    """
    key = rate_key(arms)
    if key is None:
        return None
    loss = loss_of([row for arm in arms for row in arm.rows])
    column = HELD_OUT if loss is held_out_loss else TRAINING
    best = [arm.best for arm in arms]
    columns: dict[str, list[Cell]] = {
        "Arm": [arm.name for arm in arms],
        "Learning rates": [
            ", ".join(
                _rate(row, key, loss) for row in sorted(arm.rows, key=lambda row: row.config.get(key, 0.0))
            )
            for arm in arms
        ],
        "Best": [_best_rate(arm, key, loss) for arm in arms],
        "Seeds": [plain(len(row.runs), "d") for row in best],
        column.heading: mark_best([over_seeds(row, loss, column.spec) for row in best], column.better),
    }
    if AVERAGE in result_columns(best):
        averages = [over_seeds(row, AVERAGE.value, AVERAGE.spec) for row in best]
        columns[AVERAGE.heading] = mark_best(averages, AVERAGE.better)
    base = next((arm.best for arm in arms if baseline in arm.rows), None)
    if base is not None:
        columns[f"Minus {base.name}"] = [
            None if row is base else difference_cell(row, base, loss, column.spec) for row in best
        ]
    return Table(columns)
