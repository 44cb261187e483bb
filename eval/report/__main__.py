"""A Markdown report with plots of what runs wrote: losses, differences, the paper's table, speed and cost.

`python -m eval.report runs/a runs/b [--baseline a] [--out report] [--allow-different]`

Runs that differ in run.seed, data.shuffle_seed and names alone are seeds of one row. Nothing is built or
evaluated: what a run did not record is not in the report.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from eval.report import plots
from eval.report.comparison import (
    FINAL_STEPS,
    Estimate,
    Row,
    difference,
    differing_keys,
    find_row,
    held_out_loss,
    incomparable,
    make_rows,
    task_metric,
    training_loss,
)
from eval.report.paper_numbers import SOURCE, PaperRow
from eval.report.run_records import RunRecord, read_run

NOTHING = "-"

Value = Callable[[RunRecord], float | None]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


# heading, value of a run, digits, the paper's value
_RESULTS: tuple[tuple[str, Value, int, Callable[[PaperRow], float | None] | None], ...] = (
    ("training loss", training_loss, 4, None),
    ("held-out loss", held_out_loss, 4, None),
    ("LAMBADA ppl", lambda run: task_metric(run, "lambada_openai", "perplexity"), 2,
     lambda r: r.lambada_perplexity),
    ("WikiText ppl", lambda run: task_metric(run, "wikitext", "word_perplexity"), 2,
     lambda r: r.wikitext_perplexity),
    ("mean accuracy, %", lambda run: _percent(task_metric(run, "", "mean_accuracy")), 2,
     lambda r: r.mean_accuracy),
)  # fmt: skip


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _format(value: Estimate | None, digits: int, sign: str = "") -> str:
    if value is None:
        return NOTHING
    mean = f"{value.mean:{sign},.{digits}f}"
    return mean if value.error is None else f"{mean} +/- {value.error:.{digits}f}"


def _cell(row: Row, value: Value, digits: int) -> str:
    """A value over a row's seeds; "(n of m)" behind it where fewer seeds than the row's have it."""
    found = row.over_seeds(value)
    if found is None or found.num_seeds == len(row.runs):
        return _format(found, digits)
    return f"{_format(found, digits)} ({found.num_seeds} of {len(row.runs)})"


def _difference_cell(row: Row, baseline: Row, value: Value, digits: int) -> str:
    """A row's value less the baseline's; "(n of m / n of m)" behind it where either lacks seeds."""
    here, there = row.over_seeds(value), baseline.over_seeds(value)
    if here is None or there is None:
        return NOTHING
    text = _format(difference(here, there), digits, "+")
    pairs = [(here.num_seeds, len(row.runs)), (there.num_seeds, len(baseline.runs))]
    if all(n == m for n, m in pairs):
        return text
    return f"{text} ({' / '.join(f'{n} of {m}' for n, m in pairs)})"


def _runs_table(rows: Sequence[Row]) -> list[str]:
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
            NOTHING if parameters is None else f"{parameters / 1e6:,.2f}M",
            f"{last['step']:,} of {first.last_step:,}",
            f"{last['tokens']:,}",
            NOTHING if flops is None else f"{flops:.3e}",
            str(first.folder),
        ])  # fmt: skip
    head = ("row", "runs", "seeds (weights/order)", "parameters", "steps", "tokens", "FLOPs", "first folder")
    return _table(head, body)


def _differing_table(rows: Sequence[Row]) -> list[str]:
    keys = differing_keys(rows)
    if not keys:
        return ["Nothing but seeds and names."]
    body = [[f"`{key}`", *(str(value) for value in values)] for key, values in keys.items()]
    return _table(("key", *(row.name for row in rows)), body)


def _results_table(rows: Sequence[Row]) -> list[str]:
    papers = [row.paper for row in rows]
    with_paper = any(paper is not None for paper in papers)
    head = ["row", "seeds"]
    for name, _, _, of_paper in _RESULTS:
        head += [name, "paper"] if with_paper and of_paper else [name]
    body = []
    for row, paper in zip(rows, papers, strict=True):
        cells = [row.name, str(len(row.runs))]
        for _, value, digits, of_paper in _RESULTS:
            cells.append(_cell(row, value, digits))
            if with_paper and of_paper:
                stated = of_paper(paper) if paper is not None else None
                cells.append(NOTHING if stated is None else f"{stated:.2f}")
        body.append(cells)
    source = f"The paper: {SOURCE}." if with_paper else f"No row is one of the paper's ({SOURCE})."
    finished = (run for row in rows for run in row.runs if run.is_finished)
    averaged = {min(FINAL_STEPS, len(run.steps)) for run in finished} or {FINAL_STEPS}
    explained = [
        "After the last step, mean +/- standard error over seeds, (n of m) where n of a row's m seeds have a "
        "value; losses in nats/token, the training loss over the last "
        f"{' or '.join(map(str, sorted(averaged)))} steps. {source}",
        "",
    ]
    return explained + _table(head, body)


def _tasks_table(rows: Sequence[Row]) -> list[str]:
    """Every metric of every task; empty where no run evaluated tasks."""
    last = [run.tasks[-1] for row in rows for run in row.runs if run.tasks]
    keys = sorted({key for record in last for key in record if key.startswith("tasks/")})
    if not keys:
        return []
    body = []
    for key in keys:
        task, _, metric = key.removeprefix("tasks/").rpartition("/")
        value = partial(task_metric, task=task, metric=metric)
        if metric == "num_documents":
            counts = [sorted({n for run in row.runs if (n := value(run)) is not None}) for row in rows]
            found = [", ".join(f"{n:,.0f}" for n in each) or NOTHING for each in counts]
        else:
            found = [_cell(row, value, 4) for row in rows]
        if "stderr" not in metric:
            body.append([key.removeprefix("tasks/"), *found])
    return ["", "### Every task", "", *_table(("metric", *(row.name for row in rows)), body)]


def _differences_table(rows: Sequence[Row], baseline: Row) -> list[str]:
    head = ["row", "seeds here / there", *(name for name, *_ in _RESULTS)]
    body = []
    for row in rows:
        if row is not baseline:
            deltas = (_difference_cell(row, baseline, value, digits) for _, value, digits, _ in _RESULTS)
            body.append([row.name, f"{len(row.runs)} / {len(baseline.runs)}", *deltas])
    lines = [
        f"Row less `{baseline.name}`, +/- sqrt(s1^2/n1 + s2^2/n2) over seeds, s^2 over n - 1.",
        "",
        *_table(head, body),
    ]
    single = [row.name for row in rows if len(row.runs) == 1]
    if single:
        lines += ["", f"One seed, so no error: {', '.join(single)}."]
    return lines


def _median(run: RunRecord, key: str) -> float | None:
    found = [s[key] for s in run.steps[run.num_trunk_steps :] if s.get(key) is not None]
    return statistics.median(found) if found else None


def _peak(run: RunRecord) -> float | None:
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
    return ", ".join(sorted(kinds)) or NOTHING


def _cost_table(rows: Sequence[Row]) -> list[str]:
    head = (
        *("row", "ranks", "tokens/s", "MFU, %", "peak memory, GiB"),
        *("hours a run", "device-hours a run", "device-hours, all seeds"),
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
            _cell(row, _peak, 1),
            _cell(row, lambda run: run.steps[-1]["seconds"] / 3600, 3),
            _cell(row, _device_hours, 3),
            f"{sum(known):,.3f}" if len(known) == len(hours) else NOTHING,
        ])  # fmt: skip
    explained = (
        "Medians over steps. Device-hours (GPU-hours on GPUs) are the seconds of training steps times ranks, "
        "those of the run that a branch started from included; evaluations, checkpoints and steps that a "
        "resumed run made again are not."
    )
    return [explained, "", *_table(head, body)]


def _curves(rows: Sequence[Row], baseline: Row | None, out: Path) -> list[str]:
    drawn: list[str] = []
    for axis, title in plots.AXES.items():
        if plots.plot_loss(rows, axis, out / f"loss_{axis}.png"):
            drawn.append(f"![training loss against {title}](loss_{axis}.png)")
        else:
            drawn.append(f"No run recorded its {title}.")
    if plots.plot_held_out(rows, out / "held_out.png"):
        drawn.append("![held-out loss against tokens](held_out.png)")
    if baseline is not None and plots.plot_differences(rows, baseline, out / "differences.png"):
        drawn.append(f"![loss less that of {baseline.name}](differences.png)")
    part = plots.SMOOTHED_PART
    return [
        f"Training losses are running means over 1/{part} of a run.",
        *(s for d in drawn for s in ("", d)),
    ]


def write_report(
    folders: Sequence[Path], *, baseline: str | None, out: Path, allow_different: bool = False
) -> Path:
    """Write report.md and its plots.

    Args:
        folders: Run folders; those without records are named in the report.
        baseline: Name of the row that differences are taken to; None for no differences.
        out: Folder to write to.
        allow_different: Compare runs of different data, tokenizer or token budget; the report says so first.

    Returns:
        The path of report.md.

    Raises:
        ValueError: A folder is missing, the baseline is no row, or the runs may not be compared: names
            the keys.
    """
    runs = [read_run(folder) for folder in folders]
    rows = make_rows([run for run in runs if run.steps])
    base = find_row(rows, baseline) if baseline is not None else None
    problems = incomparable(rows) if rows else []
    if problems and not allow_different:
        raise ValueError(
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
        lines += ["## Runs", "", *_runs_table(rows), ""]
        lines += ["## What differs", "", *_differing_table(rows), ""] if len(rows) > 1 else []
        lines += ["## Results", "", *_results_table(rows), *_tasks_table(rows), ""]
        if base is not None and len(rows) > 1:
            lines += [f"## Difference to {base.name}", "", *_differences_table(rows, base), ""]
        lines += ["## Throughput and cost", "", *_cost_table(rows), ""]
        lines += ["## Curves", "", *_curves(rows, base, out), ""]
    path = out / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name.

    Returns:
        The exit code: 0, or 2 for runs that cannot be compared.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--baseline", help="name of a run to subtract")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to (report)")
    parser.add_argument(
        "--allow-different", action="store_true", help="compare runs of other data, tokenizer or token budget"
    )
    options = parser.parse_args(arguments)
    try:
        path = write_report(
            options.runs,
            baseline=options.baseline,
            out=options.out,
            allow_different=options.allow_different,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path.read_text(encoding="utf-8"))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
