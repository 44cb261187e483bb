"""Spikes of the gradient norm are counted by the stated rule."""

import math
import random
import statistics

from eval.report.spikes import FACTOR, MIN_STEPS, WINDOW, find_spikes, running_medians


def test_running_medians_are_over_the_steps_before() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        values = [rng.choice((1.0, 2.0, rng.random())) for _ in range(rng.randrange(3 * WINDOW))]
        window = rng.choice((MIN_STEPS, 31, WINDOW))
        found = running_medians(values, window)
        assert found[:MIN_STEPS] == [None] * min(MIN_STEPS, len(values))
        for index in range(MIN_STEPS, len(values)):
            assert found[index] == statistics.median(values[max(0, index - window) : index])


def test_a_spike_is_above_a_multiple_of_the_median_of_the_steps_before() -> None:
    norms = [1.0] * 300
    norms[5] = 50.0  # among the first steps, which are not judged
    norms[50] = FACTOR  # not above
    norms[100] = FACTOR + 0.01
    norms[200:203] = [5.0, 9.0, 4.0]  # one spike, at its largest value
    norms[204] = 7.0
    assert find_spikes(norms) == [100, 201, 204]


def test_a_norm_that_falls_or_grows_slowly_has_no_spikes() -> None:
    assert find_spikes([100.0 / step for step in range(1, 1000)]) == []
    assert find_spikes([1.01**step for step in range(500)]) == []
    assert find_spikes([]) == []


def test_a_lasting_rise_is_one_spike() -> None:
    assert find_spikes([1.0] * 200 + [10.0] * 300) == [200]


def test_norms_of_nan_are_left_out_of_the_medians_and_are_no_spikes() -> None:
    values = [1.0] * 400
    values[30] = values[150] = math.nan
    values[200] = math.inf
    medians = running_medians(values)
    assert medians[MIN_STEPS:] == [1.0] * (400 - MIN_STEPS)
    assert find_spikes(values) == [200]
    assert running_medians([math.nan] * 30) == [None] * 30
