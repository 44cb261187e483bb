"""Tables as Markdown and as CSV: numbers with errors, the best in bold, no empty columns."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from disk import write_text
from eval.report.seed_statistics import Estimate

_NO_VALUE = "-"

Better = Literal["lower", "higher"]


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number in a table.

    Attributes:
        value: The number.
        spec: Its format, such as ",.4f".
        error: Its standard error; None where there is none.
        note: Shown behind it in parentheses, such as "2 of 3" seeds.
        is_best: Whether it is in bold.
    """

    value: float
    spec: str
    error: float | None = None
    note: str = ""
    is_best: bool = False

    @property
    def text(self) -> str:
        """The number as in a paper: 2.4050 ± 0.0050."""
        text = format(self.value, self.spec)
        if self.error is not None:
            text += f" ± {format(self.error, self.spec.lstrip('+'))}"
        return f"{text} ({self.note})" if self.note else text


Cell = str | Number | None
"""A text, a number, or None where there is nothing."""


def number(value: Estimate | None, spec: str, note: str = "") -> Number | None:
    """Make a number of a mean over seeds; None without one."""
    return None if value is None else Number(value=value.mean, error=value.error, spec=spec, note=note)


def noted(value: Estimate | None, spec: str, num_runs: int) -> Number | None:
    """Make a number of a mean over seeds, noted "n of m" where only n of the m runs have a value."""
    if value is None or value.num_seeds == num_runs:
        return number(value, spec)
    return number(value, spec, f"{value.num_seeds} of {num_runs}")


def plain(value: float | None, spec: str) -> Number | None:
    """Make a number without an error; None without one."""
    return None if value is None else Number(value=value, spec=spec)


def mark_best(cells: Sequence[Cell], better: Better | None) -> list[Cell]:
    """Mark the best of at least two numbers that are not NaN, and those that look like it.

    Args:
        cells: The cells to compare.
        better: Which numbers are better; None to mark none.
    """
    # every comparison with NaN is false: it would be the best where it is the first
    numbers = [cell for cell in cells if isinstance(cell, Number) and not math.isnan(cell.value)]
    if better is None or len(numbers) < 2:
        return list(cells)
    best = (min if better == "lower" else max)(numbers, key=lambda each: each.value)
    look = format(best.value, best.spec)
    return [
        replace(cell, is_best=True)
        if isinstance(cell, Number) and format(cell.value, cell.spec) == look
        else cell
        for cell in cells
    ]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Heading -> cells, in sentence case and with the unit in parentheses; the first column names
            the lines.
    """

    columns: dict[str, list[Cell]]

    def _kept(self) -> dict[str, list[Cell]]:
        """Return the columns that have a value."""
        return {heading: cells for heading, cells in self.columns.items() if any(cells)}

    def markdown(self) -> list[str]:
        """Format the table as lines of Markdown, numbers to the right."""
        kept = self._kept()
        are_numbers = [any(isinstance(cell, Number) for cell in cells) for cells in kept.values()]
        rule = ["---:" if each else "---" for each in are_numbers]
        body = [list(map(_markdown_cell, line)) for line in zip(*kept.values(), strict=True)]
        lines = [[heading.replace("|", "\\|") for heading in kept], rule, *body]
        return ["| " + " | ".join(line) + " |" for line in lines]

    def write_csv(self, path: Path) -> None:
        """Write the table as CSV: numbers in full, standard errors and notes in columns of their own."""
        expanded: dict[str, list[str]] = {}
        for shown, cells in self._kept().items():
            heading = shown.replace("`", "")
            expanded[heading] = ["" if cell is None else _csv_value(cell) for cell in cells]
            numbers = [cell if isinstance(cell, Number) else None for cell in cells]
            if any(each is not None and each.error is not None for each in numbers):
                errors = [None if each is None else each.error for each in numbers]
                expanded[f"{heading}, s.e."] = ["" if each is None else repr(each) for each in errors]
            if any(each is not None and each.note for each in numbers):
                expanded[f"{heading}, note"] = ["" if each is None else each.note for each in numbers]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[*expanded], *zip(*expanded.values(), strict=True)])
        write_text(path, text.getvalue())


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Number):
        return f"**{cell.text}**" if cell.is_best else cell.text
    return (cell or _NO_VALUE).replace("|", "\\|")


def _csv_value(cell: str | Number) -> str:
    if isinstance(cell, str):
        return cell
    return str(int(cell.value)) if float(cell.value).is_integer() else repr(cell.value)
