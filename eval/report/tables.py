"""The report's Markdown tables: runs, differing keys, results beside the paper's, differences, cost."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from eval.report.comparison import (
    FINAL_STEPS,
    Estimate,
    Row,
    difference,
    differing_keys,
    held_out_error,
    held_out_loss,
    task_metric,
    training_loss,
)
from eval.report.paper_numbers import SOURCE, PaperRow
from eval.report.run_records import RunRecord
from eval.report.task_records import COUNTS

_NO_VALUE = "-"

Value = Callable[[RunRecord], float | None]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


class _Column(NamedTuple):
    heading: str
    value: Value
    digits: int
    paper_value: Callable[[PaperRow], float | None] | None


_HELD_OUT_ERROR = _Column("s.e. over documents", held_out_error, 4, None)
_RESULTS = (
    _Column("training loss", training_loss, 4, None),
    _Column("held-out loss", held_out_loss, 4, None),
    _HELD_OUT_ERROR,
    _Column(
        "LAMBADA ppl",
        lambda run: task_metric(run, "lambada_openai", "perplexity"),
        2,
        lambda row: row.lambada_perplexity,
    ),
    _Column(
        "WikiText ppl",
        lambda run: task_metric(run, "wikitext", "word_perplexity"),
        2,
        lambda row: row.wikitext_perplexity,
    ),
    _Column(
        "mean accuracy, %",
        lambda run: _percent(task_metric(run, "", "mean_accuracy")),
        2,
        lambda row: row.mean_accuracy,
    ),
)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _format(value: Estimate | None, digits: int, sign: str = "") -> str:
    if value is None:
        return _NO_VALUE
    mean = f"{value.mean:{sign},.{digits}f}"
    return mean if value.error is None else f"{mean} +/- {value.error:.{digits}f}"


def _cell(row: Row, value: Value, digits: int) -> str:
    """Format a value over a row's seeds, with "(n of m)" where only n of its m seeds have one."""
    found = row.over_seeds(value)
    if found is None or found.num_seeds == len(row.runs):
        return _format(found, digits)
    return f"{_format(found, digits)} ({found.num_seeds} of {len(row.runs)})"


def _difference_cell(row: Row, baseline: Row, value: Value, digits: int) -> str:
    """Format row - baseline, with "(n of m / n of m)" where not all seeds of either have a value."""
    ours, base = row.over_seeds(value), baseline.over_seeds(value)
    if ours is None or base is None:
        return _NO_VALUE
    text = _format(difference(ours, base), digits, "+")
    pairs = [(ours.num_seeds, len(row.runs)), (base.num_seeds, len(baseline.runs))]
    if all(n == m for n, m in pairs):
        return text
    return f"{text} ({' / '.join(f'{n} of {m}' for n, m in pairs)})"


def runs_table(rows: Sequence[Row]) -> list[str]:
    """Format the runs of each row: seeds, size, progress, FLOPs, folder."""
    body = []
    for row in rows:
        first, last = row.runs[0], row.runs[0].steps[-1]
        parameters, flops = last.get("num_parameters"), last["flops"]
        seeds = [
            f"{r.config.get('run.seed', 0)}/{r.config.get('data.shuffle_seed', 'none')}" for r in row.runs
        ]
        body.append([
            row.name,
            str(len(row.runs)),
            ", ".join(seeds),
            _NO_VALUE if parameters is None else f"{parameters / 1e6:,.2f}M",
            f"{last['step']:,} of {first.last_step:,}",
            f"{last['tokens']:,}",
            _NO_VALUE if flops is None else f"{flops:.3e}",
            str(first.folder),
        ])  # fmt: skip
    head = ("row", "runs", "seeds (weights/order)", "parameters", "steps", "tokens", "FLOPs", "first folder")
    return _table(head, body)


def differing_table(rows: Sequence[Row]) -> list[str]:
    """Format the config keys in which rows differ."""
    keys = differing_keys(rows)
    if not keys:
        return ["Only seeds and names."]
    body = [[f"`{key}`", *(str(value) for value in values)] for key, values in keys.items()]
    return _table(("key", *(row.name for row in rows)), body)


def results_table(rows: Sequence[Row]) -> list[str]:
    """Format losses and the paper's metrics after the last step, beside the paper's values."""
    papers = [row.paper for row in rows]
    with_paper = any(paper is not None for paper in papers)
    head = ["row", "seeds"]
    for column in _RESULTS:
        head += [column.heading, "paper"] if with_paper and column.paper_value else [column.heading]
    body = []
    for row, paper in zip(rows, papers, strict=True):
        cells = [row.name, str(len(row.runs))]
        for column in _RESULTS:
            cells.append(_cell(row, column.value, column.digits))
            if with_paper and column.paper_value:
                stated = column.paper_value(paper) if paper is not None else None
                cells.append(_NO_VALUE if stated is None else f"{stated:.2f}")
        body.append(cells)
    source = f"Paper: {SOURCE}." if with_paper else f"No row is in the paper ({SOURCE})."
    finished = (run for row in rows for run in row.runs if run.is_finished)
    averaged = {min(FINAL_STEPS, len(run.steps)) for run in finished} or {FINAL_STEPS}
    notes = [
        "After the last step: mean +/- standard error over seeds, with (n of m) where only n of a row's m "
        "seeds have a value. Losses are in nats/token, the training loss averaged over the last "
        f"{' or '.join(map(str, sorted(averaged)))} steps. s.e. over documents: of one run's "
        f"held-out loss, over the documents it was measured on, which runs share. {source}",
        "",
    ]
    return notes + _table(head, body)


def tasks_table(rows: Sequence[Row]) -> list[str]:
    """Format every metric of every task after the last step; empty where no run evaluated tasks."""
    last = [run.tasks[-1] for row in rows for run in row.runs if run.tasks]
    keys = sorted({key for record in last for key in record if key.startswith("tasks/")})
    if not keys:
        return []
    body = []
    for key in keys:
        task, _, metric = key.removeprefix("tasks/").rpartition("/")
        value = partial(task_metric, task=task, metric=metric)
        if metric in COUNTS:
            counts = [sorted({n for run in row.runs if (n := value(run)) is not None}) for row in rows]
            found = [", ".join(f"{n:,.0f}" for n in each) or _NO_VALUE for each in counts]
        else:
            found = [_cell(row, value, 4) for row in rows]
        if "stderr" not in metric:
            body.append([key.removeprefix("tasks/"), *found])
    return ["", "### All tasks", "", *_table(("metric", *(row.name for row in rows)), body)]


def differences_table(rows: Sequence[Row], baseline: Row) -> list[str]:
    """Format the differences of results, row - baseline."""
    columns = [column for column in _RESULTS if column is not _HELD_OUT_ERROR]
    head = ["row", "seeds of row / baseline", *(column.heading for column in columns)]
    body = []
    for row in rows:
        if row is not baseline:
            deltas = (_difference_cell(row, baseline, each.value, each.digits) for each in columns)
            body.append([row.name, f"{len(row.runs)} / {len(baseline.runs)}", *deltas])
    lines = [
        f"Row - `{baseline.name}` +/- sqrt(s1^2/n1 + s2^2/n2), with sample variances s^2 over n seeds.",
        "",
        *_table(head, body),
    ]
    single = [row.name for row in rows if len(row.runs) == 1]
    if single:
        lines += ["", f"No standard error (one seed): {', '.join(single)}."]
    return lines


def _median(run: RunRecord, key: str) -> float | None:
    found = [s[key] for s in run.steps[run.num_trunk_steps :] if s.get(key) is not None]
    return statistics.median(found) if found else None


def _counts_whole_rows(run: RunRecord) -> bool:
    last = run.steps[-1]
    return last.get("mfu_percent") is not None and "mfu_whole_rows_percent" not in last


def _peak_memory(run: RunRecord) -> float | None:
    found = [s["peak_memory_gib"] for s in run.steps if s.get("peak_memory_gib") is not None]
    return max(found) if found else None


def _device_hours(run: RunRecord) -> float | None:
    seconds = run.steps[-1]["rank_seconds"]
    return None if seconds is None else seconds / 3600


def _launches(row: Row) -> str:
    kinds = {
        f"{s['num_ranks']} x {s['device']}"
        for run in row.runs
        for s in run.steps[run.num_trunk_steps :]
        if "num_ranks" in s
    }
    return ", ".join(sorted(kinds)) or _NO_VALUE


def cost_table(rows: Sequence[Row]) -> list[str]:
    """Format throughput, memory and time."""
    head = (
        *("row", "ranks", "tokens/s", "MFU, %", "peak memory, GiB"),
        *("hours per run", "device-hours per run", "device-hours, all seeds"),
    )
    body = []
    for row in rows:
        hours = [_device_hours(run) for run in row.runs]
        known = [x for x in hours if x is not None]
        body.append([
            row.name,
            _launches(row),
            _cell(row, lambda run: _median(run, "tokens_per_second"), 0),
            _cell(row, lambda run: _median(run, "mfu_percent"), 1),
            _cell(row, _peak_memory, 1),
            _cell(row, lambda run: run.steps[-1]["seconds"] / 3600, 3),
            _cell(row, _device_hours, 3),
            f"{sum(known):,.3f}" if len(known) == len(hours) else _NO_VALUE,
        ])  # fmt: skip
    notes = (
        "Throughput is the median over steps. Device-hours (GPU-hours on GPUs) are the time of training "
        "steps times ranks. They include the run that a branch started from, but not evaluations, "
        "checkpoints, and steps that were lost and repeated after a resume."
    )
    old = [row.name for row in rows if any(map(_counts_whole_rows, row.runs))]
    if old:
        notes += f" MFU counts every row as one document in runs of an earlier version: {', '.join(old)}."
    return [notes, "", *_table(head, body)]
