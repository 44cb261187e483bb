"""Tables as in a paper: the best is bold, no column is empty, CSV has the numbers in full."""

import csv
from pathlib import Path

from eval.report.seed_statistics import Estimate, difference, estimate
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
            ["Row", "Loss", "Loss, s.e.", "Loss, seeds", "Count"],
            ["a|b", "2.5", "0.5", "", "3"],
            ["c, d", "1234.5", "", "1 of 2", ""],
        ]


def test_a_difference_has_an_error_only_where_both_have_one() -> None:
    two, one = estimate([1.0, 3.0]), estimate([5.0])
    assert difference(two, one) == Estimate(mean=-3.0, error=None, num_seeds=1)
    found = difference(two, estimate([0.0, 0.0, 3.0]))
    assert found is not None
    assert found.error is not None
    assert found.mean == 1.0
    assert abs(found.error - (1.0 + 1.0) ** 0.5) < 1e-12
    assert difference(two, None) is None
    assert estimate([]) is None
