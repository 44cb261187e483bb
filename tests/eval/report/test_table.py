"""Tables as in a paper: the best is bold, no column is empty, CSV has the numbers in full."""

import csv
import math
import random
from pathlib import Path

import pytest

from eval.report.seed_statistics import Difference, difference, estimate
from eval.report.table import Number, Table, mark_best, number, plain


def test_the_best_is_bold_by_its_direction_and_with_those_that_look_like_it() -> None:
    cells = [plain(2.41, ",.1f"), None, plain(2.38, ",.1f"), plain(3.0, ",.1f"), "text"]

    def best(marked: list) -> list[bool]:
        return [isinstance(cell, Number) and cell.is_best for cell in marked]

    assert best(mark_best(cells, "lower")) == [True, False, True, False, False]
    assert best(mark_best(cells, "higher")) == [False, False, False, True, False]
    assert best(mark_best(cells, None)) == [False] * 5
    # one number alone is not the best of anything
    assert best(mark_best(cells[:2], "lower")) == [False, False]


def test_a_table_has_no_empty_columns_and_escapes_bars(tmp_path: Path) -> None:
    table = Table(
        {
            "Row": ["a|b", "c, d"],
            "Loss": [number(estimate([2.0, 3.0]), ",.2f"), Number(value=1234.5, spec=",.2f", note="1 of 2")],
            "Nothing": [None, ""],
            "Count": [plain(3, "d"), None],
        }
    )
    assert table.markdown() == [
        "| Row | Loss | Count |",
        "| --- | ---: | ---: |",
        "| a\\|b | 2.50 ± 0.50 | 3 |",
        "| c, d | 1,234.50 (1 of 2) | - |",
    ]
    table.write_csv(tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        assert [*csv.reader(file)] == [
            ["Row", "Loss", "Loss, s.e.", "Loss, note", "Count"],
            ["a|b", "2.5", "0.5", "", "3"],
            ["c, d", "1234.5", "", "1 of 2", ""],
        ]


def test_a_difference_has_an_error_only_where_both_have_one() -> None:
    two = {1: 1.0, 2: 3.0}

    def single(mean: float, pairing: str) -> Difference:
        return Difference(mean=mean, error=None, num_seeds=1, pairing=pairing)

    assert difference(two, {7: 5.0}) == single(-3.0, "unpaired, 2 and 1 seeds")
    # at the seeds that both have
    assert difference(two, {1: 5.0}) == single(-4.0, "1 pair")
    assert difference(two, {2: 2.0, 1: 4.0, 9: 100.0}) == Difference(
        mean=-1.0, error=2.0, num_seeds=2, pairing="2 pairs"
    )
    assert difference({1: 2.0}, {1: 5.0}) == single(-3.0, "1 pair")
    # three other seeds, of mean 1 and standard error 1
    assert difference(two, {5: 0.0, 3: 0.0, 4: 3.0}) == Difference(
        mean=1.0, error=math.hypot(1, 1), num_seeds=2, pairing="unpaired, 2 and 3 seeds"
    )
    assert difference(two, {}) is None
    assert difference({}, {}) is None
    assert estimate([]) is None


def test_what_the_runs_of_a_seed_have_in_common_drops_out_of_their_difference() -> None:
    for trial in range(20):
        rng = random.Random(trial)
        noise = {seed: rng.gauss(0, 1) for seed in range(4)}
        base = {seed: noise[seed] for seed in noise}
        ours = {seed: noise[seed] - 0.25 for seed in reversed(noise)}
        found = difference(ours, base)
        assert found is not None
        assert found.error is not None
        assert abs(found.mean + 0.25) < 1e-12
        assert found.error < 1e-12


def test_nan_is_never_the_best() -> None:
    values = [math.nan, 2.0, 3.0, math.inf]
    for _ in values:
        values.append(values.pop(0))
        for better, expected in (("lower", 2.0), ("higher", math.inf)):
            cells = mark_best([plain(value, ".2f") for value in values], better)
            assert [each.value for each in cells if isinstance(each, Number) and each.is_best] == [expected]
    alone = mark_best([plain(value, ".2f") for value in (math.nan, 1.0)], "lower")
    assert not any(isinstance(each, Number) and each.is_best for each in alone)


def test_one_shared_seed_of_several_is_no_reason_to_drop_the_others() -> None:
    ours, base = {0: 1.0, 1: 1.2, 2: 1.4}, {2: 2.0, 3: 2.2, 4: 2.4}
    found = difference(ours, base)
    assert found is not None
    assert found.error is not None
    assert found.mean == pytest.approx(-1.0)
    assert found.error == pytest.approx(math.hypot(0.2 / math.sqrt(3), 0.2 / math.sqrt(3)))
    # with a single run on one side, the pair
    single = difference({2: 1.5}, base)
    assert single == Difference(mean=-0.5, error=None, num_seeds=1, pairing="1 pair")
    assert found.pairing == "unpaired, 3 and 3 seeds"


def test_a_mean_of_a_value_that_is_not_finite_has_no_error() -> None:
    for values in ([math.nan, 1.0], [math.inf, 1.0], [math.inf, -math.inf]):
        found = estimate(values)
        assert found is not None
        assert not math.isfinite(found.mean)
        assert (found.error, found.num_seeds) == (None, 2)
    # still a difference of pairs or of means, as with finite values
    one = difference({0: math.nan, 1: 1.0}, {1: 1.0, 2: 2.0})
    assert one is not None
    assert math.isnan(one.mean)
    assert one.pairing == "unpaired, 2 and 2 seeds"
