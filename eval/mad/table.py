"""The tables of scores and of solved runs: a line for each task, a column for attention and optimizer."""

from collections.abc import Mapping, Sequence

from eval.mad.runs import SOLVED, Outcome, Run
from eval.mad.scores import Column, found_grid, make_columns
from eval.mad.settings import TASKS, Level, Task, settings, settings_of
from eval.report.paper_numbers import MAD_SCORES, SOURCE
from eval.report.seed_statistics import Estimate
from eval.report.table import Cell, Table, mark_best, number, plain

_SPEC = ".3f"
_OF_PAPER = ", paper"


def score_table(results: Mapping[Run, Outcome], tasks: Sequence[Task], level: Level) -> Table:
    """Make the table of all attentions and optimizers that have a run of the level.

    Args:
        results: Outcomes of runs.
        tasks: Tasks of the table; the last line is their mean.
        level: The settings that a task's score is the mean of.

    Returns:
        The table. A score is the mean over seeds with complete grids, with its standard error; without one it
        is the number of runs that are there. Behind our columns are the paper's, of MAD's own settings, for
        the attentions of these columns: at the levels "full" and "baseline", its mean beside all six tasks.
    """
    columns = make_columns(results, settings_of(tasks, level))
    cells = [_cells(column, results, tasks, level) for column in columns]
    lines = [mark_best(line, "higher") for line in zip(*cells, strict=True)]
    ours = {column.name: [line[i] for line in lines] for i, column in enumerate(columns)}
    return Table({"task": [*tasks, "mean"], **ours, **_paper_columns(columns, tasks, level)})


def score_lines(results: Mapping[Run, Outcome], tasks: Sequence[Task], level: Level) -> list[str]:
    """Format the table of scores as Markdown, and say which settings the paper's are means over."""
    lines = score_table(results, tasks, level).markdown()
    note = f"The paper's scores ({SOURCE}) are means over MAD's settings, those of --level full."
    return [*lines, "", note] if _OF_PAPER in lines[0] else lines


def _paper_columns(columns: Sequence[Column], tasks: Sequence[Task], level: Level) -> dict[str, list[Cell]]:
    """Return the paper's scores of the attentions of our columns."""
    if level not in ("baseline", "full"):
        return {}
    last = "mean" if set(tasks) == set(TASKS) else ""
    kinds = dict.fromkeys(column.recipes[0].attention for column in columns)
    return {
        f"{kind}{_OF_PAPER}": [plain(MAD_SCORES[kind].get(row), _SPEC) for row in (*tasks, last)]
        for kind in kinds
        if kind in MAD_SCORES
    }


def solution_table(results: Mapping[Run, Outcome], tasks: Sequence[Task], level: Level) -> Table:
    """Make the table of how many runs were solved, and how soon: where all scores are 1, what still differs.

    Args:
        results: Outcomes of runs.
        tasks: Tasks of the table.
        level: The settings of the tasks.

    Returns:
        The table. "epoch 13, 5 of 6" are the first epoch after which a run had a test accuracy of 0.999, as
        the mean over settings and seeds that have one, and the runs that reached it, of those in grids of
        which all were trained to their ends.
    """
    columns = make_columns(results, settings_of(tasks, level))
    ours = {column.name: [_solutions(column, results, task, level) for task in tasks] for column in columns}
    return Table({"task": [*tasks], **ours})


def _solutions(column: Column, results: Mapping[Run, Outcome], task: Task, level: Level) -> Cell:
    num_solved = num_runs = 0
    first: list[int] = []
    for runs in (found_grid(results, recipe, s) for recipe in column.recipes for s in settings(task, level)):
        outcomes = [results[run] for run in runs if run in results]
        solved = [each.num_epochs for each in outcomes if each.accuracy >= SOLVED]
        first += [min(solved)] if solved else []
        if not (solved and runs[0].recipe.ends_when_solved):
            num_runs, num_solved = num_runs + len(outcomes), num_solved + len(solved)
    epochs = [f"epoch {sum(first) / len(first):.3g}"] if first else []
    counts = [f"{num_solved} of {num_runs}"] if num_runs else []
    return ", ".join(epochs + counts) or None


def _cells(column: Column, results: Mapping[Run, Outcome], tasks: Sequence[Task], level: Level) -> list[Cell]:
    cells: list[Cell] = []
    for task in tasks:
        score = column.task_estimate(results, task, level)
        num_done, num_runs = column.count_runs(results, task, level)
        cells.append(_number(score, column) if score else f"{num_done} of {num_runs} runs")
    return [*cells, _number(column.mean_estimate(results, tasks, level), column)]


def _number(score: Estimate | None, column: Column) -> Cell:
    num_seeds = len(column.recipes)
    is_complete = score is None or score.num_seeds == num_seeds
    return number(score, _SPEC, "" if is_complete or score is None else f"{score.num_seeds} of {num_seeds}")
