"""Figures that a report would save, caught before the slow rendering."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Return the saved figures by the name of their file; `monkeypatch.undo()` lets them be rendered."""
    found: dict[str, Figure] = {}

    def catch(figure: Figure, path: Path, **_: Any) -> None:
        found[Path(path).name] = figure
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", catch)
    return found
