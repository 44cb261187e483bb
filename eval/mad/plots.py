"""The plots of MAD: the score of each task, and the accuracy against what makes a task harder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from eval.figure import add_legend, label_axes, new_axes, new_panels, save
from eval.mad.runs import Outcome, Run
from eval.mad.scores import Column, make_columns
from eval.mad.settings import Level, Setting, Task, settings, settings_of, tasks_of
from eval.report.curves import Curve
from eval.report.drawing import draw_points
from eval.report.seed_statistics import Estimate
from eval.report.styles import COLORS, DASHES, MARKERS, Style

# size of a setting -> label of its axis
_SIZES = {
    "vocab_size": "Vocabulary",
    "seq_len": "Length (tokens)",
    "num_train_rows": "Training rows",
    "frac_noise": "Fraction of noise",
    "num_copied": "Tokens to copy",
}
_PANEL = (2.6, 2.2)


def _styles(columns: Sequence[Column]) -> dict[str, Style]:
    """Return the look of columns: color, marker by attention and changes, line, filling by optimizer."""
    chosen = [(column.recipes[0].attention, column.recipes[0].changes) for column in columns]
    kinds = dict.fromkeys([("softmax", ""), ("parallax", ""), *chosen])
    place = {kind: index for index, kind in enumerate(kinds)}
    styles: dict[str, Style] = {}
    for column, kind in zip(columns, chosen, strict=True):
        index = place[kind]
        styles[column.name] = Style(
            color=COLORS[index % len(COLORS)],
            dash=DASHES[0 if column.recipes[0].optimizer == "muon" else 1],
            marker=MARKERS[index % len(MARKERS)],
            is_main=True,
        )
    return styles


def _draw(axes: Axes, name: str, points: Mapping[float, Estimate], style: Style, *, line: bool) -> None:
    """Draw the scores of a column with error bars over seeds."""
    values = list(points.values())
    curve = Curve(
        x=list(points),
        mean=[value.mean for value in values],
        error=[value.error or 0.0 for value in values],
        num_seeds=max((value.num_seeds for value in values), default=0),
    )
    draw_points(axes, curve, style, label=name, line=line)


def plot_scores(results: Mapping[Run, Outcome], tasks: Sequence[Task], level: Level, path: Path) -> bool:
    """Plot the score of each column on each task.

    Args:
        results: Outcomes of runs.
        tasks: The tasks.
        level: The settings that a score is the mean of.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether there is a score; without one no file is written.
    """
    columns = make_columns(results, settings_of(tasks, level))
    estimates = [[column.task_estimate(results, task, level) for task in tasks] for column in columns]
    if not any(each is not None for line in estimates for each in line):
        return False
    figure, axes = new_axes(title=f"MAD, {level} settings", x="", y="Score")
    styles = _styles(columns)
    for index, (column, line) in enumerate(zip(columns, estimates, strict=True)):
        shift = 0.6 * ((index + 0.5) / len(columns) - 0.5)
        points = {place + shift: each for place, each in enumerate(line) if each is not None}
        _draw(axes, column.name, points, styles[column.name], line=False)
    axes.set_xticks(range(len(tasks)), [task.replace("-", "\n", 1) for task in tasks], fontsize=7)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(0.0, 1.03)
    add_legend(axes)
    save(figure, path)
    return True


def difficulties(task: Task) -> dict[str, list[Setting]]:
    """Return the settings of a task by the size that is changed, from its least to its largest value.

    Of all levels; each has the baseline, and at least one other value.
    """
    baseline, *changed = settings(task, "full")
    if task in tasks_of("hard"):
        changed += settings(task, "hard")
    by_size: dict[str, list[Setting]] = {}
    for name in _SIZES:
        others = [each for each in changed if getattr(each, name) != getattr(baseline, name)]
        if others:
            by_size[name] = sorted([baseline, *others], key=lambda each: getattr(each, name))
    return by_size


def plot_difficulty(results: Mapping[Run, Outcome], tasks: Sequence[Task], path: Path) -> bool:
    """Plot the best accuracy of each column against each size of the tasks, at two of its values or more.

    Args:
        results: Outcomes of runs, of any level.
        tasks: The tasks.
        path: The PNG to write; a PDF is written beside it.

    Returns:
        Whether there is a size with two accuracies; without one no file is written.
    """
    # of all levels at once: a column of one level may lack seeds or schedules of another
    columns = make_columns(results, {run.setting for run in results if run.setting.task in tasks})
    panels: list[tuple[Task, str, dict[str, dict[float, Estimate]]]] = []
    for task in tasks:
        for size, steps in difficulties(task).items():
            curves = {
                column.name: {
                    float(getattr(step, size)): score
                    for step in steps
                    if (score := column.setting_estimate(results, step)) is not None
                }
                for column in columns
            }
            if max((len(points) for points in curves.values()), default=0) > 1:
                panels.append((task, size, curves))
    if not panels:
        return False
    styles = _styles(columns)
    num_columns = min(4, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, grid = new_panels(num_rows, num_columns, size=(_PANEL[0] * num_columns, _PANEL[1] * num_rows))
    every = [axes for row in grid for axes in row]
    for axes, (task, size, curves) in zip(every, panels, strict=False):
        for name, points in curves.items():
            if points:
                _draw(axes, name, points, styles[name], line=True)
        axes.set_title(task, fontsize=9)
        label_axes(axes, x=_SIZES[size], y="Accuracy")
        axes.set_ylim(0.0, 1.03)
        values = sorted({value for points in curves.values() for value in points})
        if size != "frac_noise":
            axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values], fontsize=7)
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    add_legend(*every[: len(panels)])
    save(figure, path)
    return True
