"""Scores of MAD: the best run of a grid, the mean over a task's settings, and the spread over seeds."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from eval.mad.runs import MAX_EPOCHS, SOLVED, Outcome, Recipe, Run, grid
from eval.mad.settings import Level, Setting, Task, settings
from eval.report.seed_statistics import Estimate, estimate


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of an attention on a task.

    Attributes:
        value: Mean over settings of the best accuracy of a grid; None unless all grids are complete.
        num_done: Runs that are there.
        num_runs: Runs of the score: those that are there, and those that have to be trained.
    """

    value: float | None
    num_done: int
    num_runs: int


def is_complete(results: Mapping[Run, Outcome], runs: Sequence[Run]) -> bool:
    """Return whether all runs of a grid are there, or a solved one that ends it: others need no training."""
    found = [results[run].accuracy for run in runs if run in results]
    is_ended = runs[0].recipe.ends_when_solved and any(accuracy >= SOLVED for accuracy in found)
    return is_ended or len(found) == len(runs)


def task_score(results: Mapping[Run, Outcome], grids: Iterable[Sequence[Run]]) -> Score:
    """Compute the score of the grids of a task's settings."""
    best: list[float | None] = []
    num_done = num_runs = 0
    for runs in grids:
        found = [results[run].accuracy for run in runs if run in results]
        has_all = is_complete(results, runs)
        num_done, num_runs = num_done + len(found), num_runs + len(found if has_all else runs)
        best.append(max(found) if has_all else None)
    complete = [each for each in best if each is not None]
    value = sum(complete) / len(complete) if len(complete) == len(best) else None
    return Score(value=value, num_done=num_done, num_runs=num_runs)


def task_grids(recipe: Recipe, task: Task, level: Level) -> list[list[Run]]:
    """Return the grids of a task's settings."""
    return [grid(recipe, setting) for setting in settings(task, level)]


def found_grid(results: Mapping[Run, Outcome], recipe: Recipe, setting: Setting) -> list[Run]:
    """Return the grid of a setting of which more is there: all trained, or to the first solved one."""
    ways = (replace(recipe, ends_when_solved=early) for early in (False, True))
    return max(
        (grid(way, setting) for way in ways),
        key=lambda runs: (is_complete(results, runs), sum(run in results for run in runs)),
    )


def has_score(results: Mapping[Run, Outcome], run: Run) -> bool:
    """Return whether the grid of a run is complete, or, if a solved run may end it, has all of its runs."""
    recipe = run.recipe
    runs = found_grid(results, recipe, run.setting) if recipe.ends_when_solved else grid(recipe, run.setting)
    return is_complete(results, runs)


@dataclass(frozen=True, kw_only=True)
class Column:
    """An attention with its changes and its optimizer, over all seeds that have a run.

    Attributes:
        name: What sets it apart from the other columns.
        recipes: One for each seed; runs of a grid that ended with the first solved one count as its own.
    """

    name: str
    recipes: list[Recipe]

    def task_estimate(self, results: Mapping[Run, Outcome], task: Task, level: Level) -> Estimate | None:
        """Return the mean score on a task over the seeds with complete grids; None if there is none."""
        scores = [self._score(results, recipe, settings(task, level)).value for recipe in self.recipes]
        return estimate([score for score in scores if score is not None])

    def mean_estimate(
        self, results: Mapping[Run, Outcome], tasks: Sequence[Task], level: Level
    ) -> Estimate | None:
        """Return the mean score over tasks, over the seeds with complete grids of all tasks."""
        means: list[float] = []
        for recipe in self.recipes:
            scores = [self._score(results, recipe, settings(task, level)).value for task in tasks]
            values = [score for score in scores if score is not None]
            if len(values) == len(tasks):
                means.append(sum(values) / len(values))
        return estimate(means)

    def setting_estimate(self, results: Mapping[Run, Outcome], setting: Setting) -> Estimate | None:
        """Return the mean of the best accuracy on one setting over the seeds whose grid is complete."""
        scores = [self._score(results, recipe, [setting]).value for recipe in self.recipes]
        return estimate([score for score in scores if score is not None])

    def count_runs(self, results: Mapping[Run, Outcome], task: Task, level: Level) -> tuple[int, int]:
        """Return the numbers of runs of a task that are there and that there have to be, of all seeds."""
        scores = [self._score(results, recipe, settings(task, level)) for recipe in self.recipes]
        return sum(score.num_done for score in scores), sum(score.num_runs for score in scores)

    @staticmethod
    def _score(results: Mapping[Run, Outcome], recipe: Recipe, of: Iterable[Setting]) -> Score:
        return task_score(results, [found_grid(results, recipe, setting) for setting in of])


def make_columns(results: Mapping[Run, Outcome], chosen: Collection[Setting]) -> list[Column]:
    """Return the columns that have a run on one of the settings, in the order of the results."""
    recipes = dict.fromkeys(
        replace(run.recipe, ends_when_solved=False) for run in results if run.setting in chosen
    )
    by_seed: dict[Recipe, list[Recipe]] = {}
    for recipe in recipes:
        by_seed.setdefault(replace(recipe, seed=0), []).append(recipe)
    return [Column(name=_name(recipe, [*by_seed]), recipes=recipes) for recipe, recipes in by_seed.items()]


def _name(recipe: Recipe, others: Sequence[Recipe]) -> str:
    """Name a column by its attention, optimizer and changes, and by what else differs between columns."""
    name = ", ".join(filter(None, (recipe.attention, recipe.optimizer, recipe.changes)))
    if any(other.schedule != recipe.schedule for other in others):
        name += f", {recipe.schedule}"
    return name if recipe.max_epochs == MAX_EPOCHS else f"{name}, {recipe.max_epochs} epochs"
