"""Figures that a report would save, caught before the slow rendering."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from eval import figure


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Return the saved figures by the name of their file; `monkeypatch.undo()` lets them be rendered."""
    found: dict[str, Figure] = {}

    def catch(drawn: Figure, path: Path, **_: Any) -> None:
        found[Path(path).name] = drawn
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", catch)
    monkeypatch.setattr(figure, "shrink_png", lambda _: None)
    return found
