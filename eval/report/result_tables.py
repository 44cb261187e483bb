"""The tables of results after the last step: losses and metrics of tasks, beside the paper's."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from eval.report.gradient_peaks import FACTOR
from eval.report.paper_numbers import SOURCE, PaperRow
from eval.report.rows import Row
from eval.report.run_values import (
    FINAL_STEPS,
    Value,
    average_held_out_error,
    average_held_out_loss,
    held_out_cut_documents,
    held_out_documents,
    held_out_error,
    held_out_loss,
    held_out_tokens,
    num_peaks,
    num_skipped,
    num_spikes,
    task_metric,
    training_loss,
)
from eval.report.seed_statistics import difference
from eval.report.table import Better, Cell, Number, Table, mark_best, noted, number, plain


class Column(NamedTuple):
    """A result of a run.

    Attributes:
        heading: Heading in sentence case, with the unit.
        value: The value of a run.
        spec: Format of the value.
        better: Which values are better; None where neither is.
        paper_value: The paper's value; None where the paper has none.
    """

    heading: str
    value: Value
    spec: str
    better: Better | None
    paper_value: Callable[[PaperRow], float | None] | None = None


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


TRAINING = Column("Training loss (nats/token)", training_loss, ",.4f", "lower")
HELD_OUT = Column("Held-out loss (nats/token)", held_out_loss, ",.4f", "lower")
AVERAGE = Column("Held-out loss of the average (nats/token)", average_held_out_loss, ",.4f", "lower")
_TASKS = (
    Column(
        "LAMBADA perplexity",
        lambda run: task_metric(run, "lambada_openai", "perplexity"),
        ",.2f",
        "lower",
        lambda row: row.lambada_perplexity,
    ),
    Column(
        "WikiText perplexity",
        lambda run: task_metric(run, "wikitext", "word_perplexity"),
        ",.2f",
        "lower",
        lambda row: row.wikitext_perplexity,
    ),
    Column(
        "Mean accuracy (%)",
        lambda run: _percent(task_metric(run, "", "mean_accuracy")),
        ",.2f",
        "higher",
        lambda row: row.mean_accuracy,
    ),
)


def result_columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Return the results to show: the loss of the averaged weights only where a run has kept an average."""
    has_average = any(average_held_out_loss(run) is not None for row in rows for run in row.runs)
    return (TRAINING, HELD_OUT, *((AVERAGE,) if has_average else ()), *_TASKS)


def over_seeds(row: Row, value: Value, spec: str) -> Number | None:
    """Make a number of a value over a row's seeds, noted "n of m" where only n of its m seeds have one."""
    return noted(row.over_seeds(value), spec, len(row.runs))


def difference_cell(row: Row, baseline: Row, value: Value, spec: str) -> Number | None:
    """Make a number of row - baseline, noted with its number of pairs, or that it is unpaired."""
    found = difference(row.by_seed(value), baseline.by_seed(value))
    return None if found is None else number(found, f"+{spec}", found.pairing)


def _mean(row: Row, value: Value) -> float | None:
    found = row.over_seeds(value)
    return None if found is None else found.mean


def _counts(row: Row, value: Value) -> Cell:
    """Make a cell of a count that a row's runs share, such as that of documents; of all where they differ."""
    found = sorted({n for run in row.runs if (n := value(run)) is not None})
    return plain(found[0], ",.0f") if len(found) == 1 else "; ".join(f"{n:,.0f}" for n in found)


def results_table(rows: Sequence[Row]) -> Table:
    """Make the table of losses and of the paper's metrics, beside the paper's values."""
    columns: dict[str, list[Cell]] = {
        "Row": [row.name for row in rows],
        "Seeds": [plain(len(row.runs), "d") for row in rows],
    }
    papers = [row.paper for row in rows]
    shown = result_columns(rows)
    for column in shown:
        cells = [over_seeds(row, column.value, column.spec) for row in rows]
        columns[column.heading] = mark_best(cells, column.better)
        if column is HELD_OUT:
            columns["S.e. over documents (nats/token)"] = [
                plain(_mean(row, held_out_error), ",.4f") for row in rows
            ]
        if column is AVERAGE:
            columns["S.e. of the average (nats/token)"] = [
                plain(_mean(row, average_held_out_error), ",.4f") for row in rows
            ]
        if column is (AVERAGE if AVERAGE in shown else HELD_OUT):
            columns["Held-out tokens"] = [_counts(row, held_out_tokens) for row in rows]
            columns["Held-out documents"] = [_counts(row, held_out_documents) for row in rows]
            columns["Documents cut into rows"] = [_counts(row, held_out_cut_documents) for row in rows]
        if column.paper_value is not None:
            stated = [None if paper is None else column.paper_value(paper) for paper in papers]
            columns[f"{column.heading}, paper"] = [plain(value, ",.2f") for value in stated]
    for heading, value in _gradient_columns(rows).items():
        columns[heading] = [over_seeds(row, value, ",.1f") for row in rows]
    return Table(columns)


def _gradient_columns(rows: Sequence[Row]) -> dict[str, Value]:
    """Return what counts steps by their gradient norm: spikes as recorded, peaks where a run lacks these."""
    runs = [run for row in rows for run in row.runs]
    columns: dict[str, Value] = {}
    if any(num_spikes(run) is not None for run in runs):
        columns["Gradient spikes"] = num_spikes
    if any(num_skipped(run) for run in runs):
        columns["Skipped steps"] = num_skipped
    if any(num_spikes(run) is None and num_peaks(run) is not None for run in runs):
        columns[f"Gradient peaks above {FACTOR:g} times the median"] = num_peaks
    return columns


def results_notes(rows: Sequence[Row]) -> str:
    """Say what the numbers of the results are."""
    finished = (run for row in rows for run in row.runs if run.is_finished)
    averaged = {min(FINAL_STEPS, len(run.steps)) for run in finished} or {FINAL_STEPS}
    with_paper = any(row.paper is not None for row in rows)
    average = ""
    if AVERAGE in result_columns(rows):
        average = "The average is that of the weights which training keeps, measured on the same tokens. "
    source = f"Paper: {SOURCE}." if with_paper else f"No row is in the paper ({SOURCE})."
    return (
        "After the last step: mean ± standard error over seeds, with (n of m) where only n of a row's m "
        "seeds have a value; the best of each column is bold. The training loss is averaged over the last "
        f"{' or '.join(map(str, sorted(averaged)))} steps. S.e. over documents: of one run's held-out loss "
        f"(the mean over seeds), over the documents it was measured on, which runs share. {average}{source}"
    )


def _better(metric: str) -> Better | None:
    if metric.startswith(("acc", "exact_match", "f1", "mean_accuracy", "mean_plain_accuracy")):
        return "higher"
    return "lower" if "perplexity" in metric or metric.startswith(("bits_per_byte", "brier")) else None


def tasks_table(rows: Sequence[Row]) -> Table | None:
    """Make the table of every metric of every task; None where no run evaluated tasks after its last step."""
    evaluated = [run for row in rows for run in row.runs if run.tasks]
    last = [run.tasks[-1] for run in evaluated if run.tasks[-1]["step"] == run.last_step]
    keys = sorted({key for record in last for key in record if key.startswith("tasks/")})
    if not keys:
        return None
    lines: list[list[Cell]] = []
    for key in keys:
        task, _, metric = key.removeprefix("tasks/").rpartition("/")
        value: Value = partial(task_metric, task=task, metric=metric)
        if metric.startswith("num_"):
            lines.append([key.removeprefix("tasks/"), *(_counts(row, value) for row in rows)])
        elif "stderr" not in metric:
            cells = mark_best([over_seeds(row, value, ",.4f") for row in rows], _better(metric))
            lines.append([key.removeprefix("tasks/"), *cells])
    headings = ("Metric", *(row.name for row in rows))
    return Table({head: list(cells) for head, cells in zip(headings, zip(*lines, strict=True), strict=True)})
