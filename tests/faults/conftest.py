"""The tally of injected faults, printed after the tests as the rows of the table in docs/training.md."""

from collections import Counter
from collections.abc import Callable

import pytest

_COUNTS: Counter[tuple[str, str]] = Counter()

Tally = Callable[[str, str], None]


@pytest.fixture
def tally() -> Tally:
    """Count a fault: tally("kill -9 in training", "equal to an uninterrupted run"), once per injection."""

    def count(fault: str, outcome: str) -> None:
        _COUNTS[fault, outcome] += 1

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if not _COUNTS:
        return
    terminalreporter.section("injected faults")
    terminalreporter.write_line("| fault | outcome | times |\n|---|---|---|")
    for (fault, outcome), count in _COUNTS.items():
        terminalreporter.write_line(f"| {fault} | {outcome} | {count} |")
