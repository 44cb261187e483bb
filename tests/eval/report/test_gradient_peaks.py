"""Peaks of the gradient norm are counted by the stated rule."""

import math
import random
import statistics
from pathlib import Path
from typing import Any

from eval.report.gradient_peaks import FACTOR, MIN_STEPS, WINDOW, find_peaks, running_medians
from tests.eval.report.run_folders import cells, launch, make_run, report, training

PEAKS = "Gradient peaks above 3 times the median"


def judged(*, spikes: tuple[int, ...] = (), skipped: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Records of steps as training writes them, with a peak in step 25."""
    return [
        {
            **{**record, "grad_norm": 9.0 if record["step"] == 25 else 1.0, "grad_norm_running": 1.0},
            **({"grad_norm_spike": 9.0, "is_skipped": record["step"] in skipped} if at else {}),
        }
        for record in training(2.0)
        for at in [record["step"] in spikes]
    ]


def test_spikes_and_skipped_steps_are_those_on_record(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [launch(), *judged()])
    row = cells(report([folder], tmp_path), "Results", "Parallax, Muon")
    # a peak is no spike
    assert row["Gradient spikes"] == "0.0"
    assert not {PEAKS, "Skipped steps"} & row.keys()
    steps = judged(spikes=(22, 23, 28), skipped=(23, 28))
    other = make_run(tmp_path / "b", [launch(), *steps], "--run.seed", "1")
    row = cells(report([folder, other], tmp_path), "Results", "Parallax, Muon")
    assert row["Gradient spikes"] == "1.5 ± 1.5"
    assert row["Skipped steps"] == "1.0 ± 1.0"
    assert PEAKS not in row


def test_peaks_are_counted_where_a_run_lacks_a_record_of_spikes(tmp_path: Path) -> None:
    old = [{k: v for k, v in record.items() if k != "grad_norm_running"} for record in judged()]
    # from a step on with a version that finds spikes
    folders = [
        make_run(tmp_path / "a", [launch(), *judged(spikes=(25,))]),
        make_run(tmp_path / "b", [launch(), *old[:20], *judged(spikes=(25,))[20:]], "--run.seed", "1"),
    ]
    row = cells(report(folders, tmp_path), "Results", "Parallax, Muon")
    assert row["Gradient spikes"] == "1.0 (1 of 2)"
    assert row[PEAKS] == "1.0 ± 0.0"
    row = cells(report(folders[1:], tmp_path), "Results", "Parallax, Muon")
    assert row[PEAKS] == "1.0"
    assert "Gradient spikes" not in row


def test_running_medians_are_over_the_steps_before() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        values = [rng.choice((1.0, 2.0, rng.random())) for _ in range(rng.randrange(3 * WINDOW))]
        window = rng.choice((MIN_STEPS, 31, WINDOW))
        found = running_medians(values, window)
        assert found[:MIN_STEPS] == [None] * min(MIN_STEPS, len(values))
        for index in range(MIN_STEPS, len(values)):
            assert found[index] == statistics.median(values[max(0, index - window) : index])


def test_a_peak_is_above_a_multiple_of_the_median_of_the_steps_before() -> None:
    norms = [1.0] * 300
    norms[5] = 50.0  # among the first steps, which are not judged
    norms[50] = FACTOR  # not above
    norms[100] = FACTOR + 0.01
    norms[200:203] = [5.0, 9.0, 4.0]  # one peak, at its largest value
    norms[204] = 7.0
    assert find_peaks(norms) == [100, 201, 204]


def test_a_norm_that_falls_or_grows_slowly_has_no_peaks() -> None:
    assert find_peaks([100.0 / step for step in range(1, 1000)]) == []
    assert find_peaks([1.01**step for step in range(500)]) == []
    assert find_peaks([]) == []


def test_a_lasting_rise_is_one_peak() -> None:
    assert find_peaks([1.0] * 200 + [10.0] * 300) == [200]


def test_norms_of_nan_are_left_out_of_the_medians_and_are_no_peaks() -> None:
    values = [1.0] * 400
    values[30] = values[150] = math.nan
    values[200] = math.inf
    medians = running_medians(values)
    assert medians[MIN_STEPS:] == [1.0] * (400 - MIN_STEPS)
    assert find_peaks(values) == [200]
    assert running_medians([math.nan] * 30) == [None] * 30
