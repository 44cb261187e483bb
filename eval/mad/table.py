"""The table of scores: a line for each task, a column for each attention, optimizer, schedule and seed."""

from collections.abc import Iterable, Mapping, Sequence

from eval.mad.results import Score, task_grids, task_score
from eval.mad.settings import Level, Task
from eval.mad.train import MAX_EPOCHS, Outcome, Recipe, Run
from eval.report.table import Cell, Number, Table, mark_best

_SPEC = ".3f"


def score_table(results: Mapping[Run, Outcome], tasks: Sequence[Task], level: Level) -> Table:
    """Make the table of all recipes that have a run of the level.

    Args:
        results: Outcomes of runs.
        tasks: Tasks of the table; the last line is their mean.
        level: The settings that a task's score is the mean of.

    Returns:
        The table; a score with runs missing is their number.
    """
    recipes = dict.fromkeys(run.recipe for run in results)
    columns = {
        recipe: [task_score(results, task_grids(recipe, task, level)) for task in tasks] for recipe in recipes
    }
    columns = {recipe: scores for recipe, scores in columns.items() if any(each.num_done for each in scores)}
    lines = [mark_best(line, "higher") for line in zip(*map(_cells, columns.values()), strict=True)]
    names = [_name(recipe, columns) for recipe in columns]
    cells = {name: [line[i] for line in lines] for i, name in enumerate(names)}
    return Table({"task": [*tasks, "mean"], **cells})


def _cells(scores: Sequence[Score]) -> list[Cell]:
    cells: list[Cell] = []
    for score in scores:
        missing = f"{score.num_done} of {score.num_runs} runs"
        cells.append(missing if score.value is None else Number(value=score.value, spec=_SPEC))
    values = [score.value for score in scores if score.value is not None]
    mean = sum(values) / len(values) if len(values) == len(scores) else None
    return [*cells, None if mean is None else Number(value=mean, spec=_SPEC)]


def _name(recipe: Recipe, columns: Iterable[Recipe]) -> str:
    """Name a column by its attention and optimizer, and by what else is not the same in all columns."""
    name = f"{recipe.attention}, {recipe.optimizer}"
    if any(other.schedule != recipe.schedule for other in columns):
        name += f", {recipe.schedule}"
    if any(other.seed != recipe.seed for other in columns):
        name += f", seed {recipe.seed}"
    return name if recipe.max_epochs == MAX_EPOCHS else f"{name}, {recipe.max_epochs} epochs"
