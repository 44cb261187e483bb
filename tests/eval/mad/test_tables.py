"""Scores of MAD, their tables and plots, of results that are given."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.mad import plots
from eval.mad.plots import difficulties, plot_difficulty, plot_scores
from eval.mad.runs import Outcome, Recipe, Run
from eval.mad.scores import task_grids, task_score
from eval.mad.settings import TASKS, Level, Task, tasks_of
from eval.mad.table import score_lines, score_table, solution_table
from eval.report.seed_statistics import Estimate

SOFTMAX, PARALLAX = Recipe(attention="softmax"), Recipe(attention="parallax")
KDA = Recipe(attention="kda")


def _outcome(accuracy: float) -> Outcome:
    return Outcome(accuracy=accuracy, loss=1.5, num_epochs=200, seconds=3.25)


def test_a_score_is_the_mean_over_settings_of_the_best_of_six() -> None:
    grids = task_grids(SOFTMAX, "memorization", "full")
    results = {
        run: _outcome(0.01 * i + 0.1 * j) for i, runs in enumerate(grids) for j, run in enumerate(runs)
    }
    score = task_score(results, grids)
    assert score.value == pytest.approx(sum(0.01 * i + 0.5 for i in range(6)) / 6)
    assert (score.num_done, score.num_runs) == (36, 36)
    del results[grids[3][2]]
    score = task_score(results, grids)
    assert (score.value, score.num_done, score.num_runs) == (None, 35, 36)


def test_the_table_shows_missing_runs_the_mean_and_the_paper() -> None:
    results = {
        run: _outcome(0.5 if task == "compression" else 0.75)
        for task in TASKS
        for run in task_grids(KDA, task, "baseline")[0]
    }
    results |= dict.fromkeys(task_grids(PARALLAX, "compression", "baseline")[0][:4], _outcome(1.0))
    lines = score_table(results, TASKS, "baseline").markdown()
    assert lines[0] == "| task | kda, adamw | parallax, adamw | parallax, paper |"
    assert lines[2] == "| in-context-recall | 0.750 | 0 of 6 runs | 0.951 |"
    assert lines[6] == "| compression | 0.500 | 4 of 6 runs | - |"
    assert lines[-1] == "| mean | 0.708 | - | 0.716 |"
    cosine = {replace(run, recipe=replace(KDA, schedule="cosine")): o for run, o in results.items()}
    assert "kda, adamw, constant" in score_table(results | cosine, TASKS, "baseline").markdown()[0]


def _all_runs(recipe: Recipe, tasks: Sequence[Task], level: Level, accuracy: float) -> dict[Run, Outcome]:
    grids = [runs for task in tasks for runs in task_grids(recipe, task, level)]
    return {run: _outcome(accuracy) for runs in grids for run in runs}


def test_the_paper_is_beside_what_its_scores_are_of() -> None:
    results = _all_runs(SOFTMAX, TASKS, "full", 0.5) | _all_runs(SOFTMAX, tasks_of("hard"), "hard", 0.5)
    for level in ("baseline", "full"):
        lines = score_lines(results, TASKS, level)
        assert lines[0].endswith("| softmax, paper |")
        assert lines[-3] == "| mean | 0.500 | 0.672 |"
        assert "means over MAD's settings, those of --level full" in lines[-1]
        # the paper's mean is of six tasks
        some = score_lines(results, ["selective-copying", "compression"], level)
        assert some[2:5] == [
            "| selective-copying | 0.500 | 0.950 |",
            "| compression | 0.500 | - |",
            "| mean | 0.500 | - |",
        ]
    for level in ("rows", "hard"):
        lines = score_lines(results, tasks_of(level), level)
        assert lines[0] == "| task | softmax, adamw |"
        assert lines[-1] == "| mean | 0.500 |"


def test_the_table_has_means_over_seeds() -> None:
    (runs,) = task_grids(KDA, "compression", "baseline")
    others = [replace(run, recipe=replace(KDA, seed=1)) for run in runs]
    results = dict.fromkeys(runs, _outcome(0.5)) | dict.fromkeys(others, _outcome(0.7))
    lines = score_table(results, ["compression"], "baseline").markdown()
    assert lines[0] == "| task | kda, adamw |"
    assert lines[2] == "| compression | 0.600 ± 0.100 |"
    del results[others[3]]
    assert (
        score_table(results, ["compression"], "baseline").markdown()[2] == "| compression | 0.500 (1 of 2) |"
    )


def test_grids_that_end_with_a_solved_run_are_seeds_of_the_same_column() -> None:
    (runs,) = task_grids(KDA, "compression", "baseline")
    early = replace(KDA, seed=1, ends_when_solved=True)
    others = [replace(run, recipe=early) for run in runs]
    results = dict.fromkeys(runs, replace(_outcome(1.0), num_epochs=20))
    results |= {run: replace(_outcome(0.1 * i), num_epochs=4) for i, run in enumerate(others)}
    results[others[3]] = replace(_outcome(1.0), num_epochs=4)
    lines = score_table(results, ["compression"], "baseline").markdown()
    assert lines[0] == "| task | kda, adamw |"
    assert lines[2] == "| compression | 1.000 ± 0.000 |"
    # which of the others would have been solved nobody knows
    assert solution_table(results, ["compression"], "baseline").markdown()[2] == (
        "| compression | epoch 12, 6 of 6 |"
    )
    results[others[3]] = _outcome(0.9)
    assert solution_table(results, ["compression"], "baseline").markdown()[2] == (
        "| compression | epoch 20, 6 of 12 |"
    )
    for run in others[:2]:
        del results[run]
    # of one seed, all runs go before those of a grid that ended early
    results |= {replace(run, recipe=replace(KDA, ends_when_solved=True)): _outcome(0.3) for run in runs[:4]}
    assert score_table(results, ["compression"], "baseline").markdown()[2] == (
        "| compression | 1.000 (1 of 2) |"
    )


def test_a_grid_that_a_solved_run_has_ended_is_complete_without_the_others() -> None:
    early = replace(KDA, ends_when_solved=True)
    (runs,) = task_grids(early, "compression", "baseline")
    (all_trained,) = task_grids(KDA, "compression", "baseline")
    results = {runs[1]: _outcome(0.4), runs[3]: replace(_outcome(0.9995), num_epochs=4)}
    # a start of the same grid with all runs trained does not count
    results |= dict.fromkeys(all_trained[:4], _outcome(0.6))
    assert score_table(results, ["compression"], "baseline").markdown()[2:] == [
        "| compression | 1.000 |",
        "| mean | 1.000 |",
    ]
    assert solution_table(results, ["compression"], "baseline").markdown()[2] == "| compression | epoch 4 |"
    results[runs[3]] = _outcome(0.9)
    assert score_table(results, ["compression"], "baseline").markdown()[2] == "| compression | 4 of 6 runs |"


def test_solved_runs_are_counted_with_their_epochs() -> None:
    (runs,) = task_grids(KDA, "compression", "baseline")
    others = [replace(run, recipe=replace(KDA, seed=1)) for run in runs[:3]]
    results = dict.fromkeys(runs, replace(_outcome(0.998), num_epochs=200))
    results |= {
        runs[2]: replace(_outcome(0.999), num_epochs=7),
        runs[4]: replace(_outcome(1.0), num_epochs=3),
    }
    tasks: list[Task] = ["compression", "memorization"]
    assert solution_table(results, tasks, "baseline").markdown()[2:] == [
        "| compression | epoch 3, 2 of 6 |",
        "| memorization | - |",
    ]
    results |= dict.fromkeys(others, replace(_outcome(1.0), num_epochs=10))
    assert solution_table(results, tasks, "baseline").markdown()[2] == "| compression | epoch 6.5, 5 of 9 |"


def test_plots_are_drawn_where_there_are_scores(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    results = {task_grids(KDA, "compression", "baseline")[0][0]: _outcome(0.5)}
    assert not plot_scores(results, TASKS, "baseline", path)
    assert not plot_difficulty(results, TASKS, path)
    results = {run: _outcome(0.5) for runs in task_grids(KDA, "compression", "full") for run in runs}
    assert not path.exists()
    assert plot_scores(results, TASKS, "baseline", path)
    assert path.exists()
    path.unlink()
    assert plot_difficulty(results, TASKS, path)
    assert path.exists()


def test_difficulty_has_all_seeds_and_schedules_of_all_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, dict[float, tuple[float, int]]]] = []

    def draw(axes: Any, name: str, points: Mapping[float, Estimate], style: Any, *, line: bool) -> None:
        drawn.append((name, {x: (round(each.mean, 6), each.num_seeds) for x, each in points.items()}))

    monkeypatch.setattr(plots, "_draw", draw)
    cosine = replace(KDA, schedule="cosine")
    results = _all_runs(KDA, ["compression"], "full", 0.4)
    results |= _all_runs(replace(KDA, seed=1), ["compression"], "full", 0.8)
    results |= _all_runs(KDA, ["compression"], "hard", 0.2) | _all_runs(cosine, ["compression"], "hard", 0.1)
    assert plot_difficulty(results, TASKS, tmp_path / "plot.png")
    both = dict.fromkeys((16.0, 32.0, 64.0, 128.0), (0.6, 2))
    assert drawn[:2] == [
        ("kda, adamw, constant", both | dict.fromkeys((256.0, 512.0), (0.2, 1))),
        ("kda, adamw, cosine", dict.fromkeys((256.0, 512.0), (0.1, 1))),
    ]


def test_difficulty_goes_from_the_baseline_to_the_hardest() -> None:
    by_size = difficulties("in-context-recall")
    assert [each.vocab_size for each in by_size["vocab_size"]] == [16, 32, 64, 128, 256, 512]
    assert [each.seq_len for each in by_size["seq_len"]] == [128, 256, 512, 1024, 2048]
    assert [each.num_train_rows for each in by_size["num_train_rows"]] == [800, 1600, 3200, 6400, 12800]
    assert [*difficulties("memorization")] == ["vocab_size"]
