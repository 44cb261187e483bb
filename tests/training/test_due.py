"""What is done every so many steps has one owner."""

import re
from pathlib import Path

from training.due import is_due

TRAINING = Path(__file__).parents[2] / "training"


def test_due_at_the_multiples_or_never() -> None:
    assert [step for step in range(10) if is_due(step, 3)] == [0, 3, 6, 9]
    assert not any(is_due(step, None) for step in range(10))


def test_nothing_else_in_training_decides_it() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in TRAINING.rglob("*.py")}
    assert [name for name, text in sorted(texts.items()) if re.search(r"step % \w*\.?\w*every", text)] == [
        "due.py"
    ]
