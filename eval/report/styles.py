"""The look of rows, the same in all plots: color by attention, line style by optimizer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.choices import choices, hidden_optimizer, is_rate
from eval.report.rows import Row, make_arms

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
"""Those of Okabe and Ito, which dichromats tell apart, without yellow (faint on white), and one more."""
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = (
    *("solid", (0, (5, 1.8)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)), (0, (3, 3))),
    *((0, (1.2, 3.5)), (0, (9, 2, 3, 2)), (0, (6, 1.5, 1.2, 1.5, 1.2, 1.5)), (0, (12, 2, 1.2, 2))),
    *((0, (2.5, 1)), (0, (16, 2)), (0, (3, 1.5, 1.2, 1.5)), (0, (9, 2, 3, 2, 3, 2))),
)

_OWN_COLORS = {"softmax": 0, "parallax": 1}
_OWN_DASHES = {"muon": 0, "adamw": 1}

Dash = str | tuple[float, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a row is drawn.

    Attributes:
        color: By the model; softmax and Parallax have the same one in every report.
        dash: Line style, by the optimizer and all else that is not the model; Muon is solid, AdamW dashed.
        marker: Of points; another one where a color comes again.
        is_main: False for a row with the learning rates of a worse loss than its arm's best: thin and faint.
    """

    color: str
    dash: Dash
    marker: str
    is_main: bool

    @property
    def colors(self) -> dict[str, Any]:
        """Colors of a line and its points, which are hollow unless the line is solid."""
        face = self.color if self.dash == "solid" else "white"
        return {"color": self.color, "markerfacecolor": face, "markeredgecolor": self.color}

    @property
    def width(self) -> float:
        """Width of lines in points."""
        return 1.6 if self.is_main else 0.8

    @property
    def alpha(self) -> float:
        """Opacity of lines."""
        return 1.0 if self.is_main else 0.3


def _number(keys: Sequence[tuple[str, str]], own: dict[str, int]) -> dict[tuple[str, str], int]:
    """Number looks: the commonest of a kind with an own number gets it, all others the next free one.

    Args:
        keys: (kind, look) of each row.
        own: kind -> number.
    """
    numbers: dict[tuple[str, str], int] = {}
    for key, _ in Counter(keys).most_common():
        wanted = own.get(key[0])
        if wanted is not None and wanted not in numbers.values():
            numbers[key] = wanted
    for key in dict.fromkeys(keys):
        if key not in numbers:
            free = (n for n in range(len(keys) + len(own)) if n not in (*numbers.values(), *own.values()))
            numbers[key] = next(free)
    return numbers


def row_styles(rows: Sequence[Row], baseline: Row | None = None) -> dict[str, Style]:
    """Choose the style of each row.

    Args:
        rows: The rows of the report, in its order.
        baseline: Drawn in full even if another learning rate of its arm is better.

    Returns:
        Name of the row -> style.
    """
    models, others = [], []
    for row in rows:
        chosen = {key: value for key, value in choices(row.config).items() if not is_rate(key)}
        model = {key: value for key, value in chosen.items() if key.startswith("model.")}
        models.append((row.config.get("model.attention.kind", ""), repr(sorted(model.items()))))
        # the patterns of a group follow the names of the model's parameters
        other = sorted(
            item for item in chosen.items() if item[0] not in model and not item[0].endswith(".parameters")
        )
        others.append((hidden_optimizer(row.config), repr(other)))
    colors, dashes = _number(models, _OWN_COLORS), _number(others, _OWN_DASHES)
    main = {arm.best.name for arm in make_arms(rows)} | ({baseline.name} if baseline is not None else set())
    return {
        row.name: Style(
            color=COLORS[colors[model] % len(COLORS)],
            marker=MARKERS[colors[model] // len(COLORS) % len(MARKERS)],
            dash=DASHES[dashes[other] % len(DASHES)],
            is_main=row.name in main,
        )
        for row, model, other in zip(rows, models, others, strict=True)
    }
