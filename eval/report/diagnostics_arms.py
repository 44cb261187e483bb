"""What the report draws of diagnostics.jsonl: means over the seeds of each row."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from eval.diagnostics.plots import Arm
from eval.report.curves import Curve, drawn_runs
from eval.report.rows import Row, seed_of
from eval.report.run_records import RunRecord
from eval.report.seed_statistics import estimate
from eval.report.styles import Style

Points = dict[float, float]
"""y by x."""


def diagnostics_arms(rows: Sequence[Row], styles: Mapping[str, Style]) -> list[Arm]:
    """Return what to draw of each main row that has diagnostics.

    Args:
        rows: The rows.
        styles: Name of a row -> its style.
    """
    main = [row for row in rows if styles[row.name].is_main]
    arms = [_arm(row, styles[row.name]) for row in main]
    return [arm for arm in arms if arm.by_layer]


def _arm(row: Row, style: Style) -> Arm:
    runs = [run for run in drawn_runs(row) if run.diagnostics]
    return Arm(
        label=row.name,
        style=style,
        by_layer=_over_seeds(runs, lambda run: by_layer(run.diagnostics[-1])),
        over_training=_over_seeds(runs, _over_training),
        by_context=_over_seeds(runs, lambda run: by_context(run.diagnostics[-1])),
    )


def by_layer(record: Mapping[str, Any]) -> dict[str, Points]:
    """Return name of a value -> layer -> value, of a record as RunRecord has it."""
    found: dict[str, Points] = {}
    for layer, values in record["values"].items():
        for name, value in values.items():
            found.setdefault(name, {})[layer] = value
    return found


def by_context(record: Mapping[str, Any]) -> dict[str, Points]:
    """Return quantity -> geometric middle of the context lengths -> mean over the layers that have it."""
    found: dict[str, Points] = {}
    for name, layers in record["by_context"].items():
        for (low, high), values in zip(record["bounds"], zip(*layers, strict=True), strict=True):
            kept = [value for value in values if value is not None]
            if kept:
                found.setdefault(name, {})[(low * high) ** 0.5] = sum(kept) / len(kept)
    return found


def _over_training(run: RunRecord) -> dict[str, Points]:
    """Return name of a value -> tokens -> mean over layers."""
    found: dict[str, Points] = {}
    for record in run.diagnostics:
        for name, layers in by_layer(record).items():
            found.setdefault(name, {})[record["tokens"]] = sum(layers.values()) / len(layers)
    return found


def _over_seeds(
    runs: Sequence[RunRecord], values: Callable[[RunRecord], dict[str, Points]]
) -> dict[str, Curve]:
    """Average over seeds, at the x that all of them have."""
    by_seed: dict[Hashable, dict[str, Points]] = {seed_of(run): values(run) for run in runs}
    names = dict.fromkeys(name for found in by_seed.values() for name in found)
    curves = {}
    for name in names:
        series = [found[name] for found in by_seed.values() if name in found]
        shared = sorted(set.intersection(*(set(each) for each in series)))
        means = [estimate([each[x] for each in series]) for x in shared]
        known = [each for each in means if each is not None]
        curves[name] = Curve(
            x=list(shared),
            mean=[each.mean for each in known],
            error=[each.error or 0.0 for each in known],
            num_seeds=len(series),
        )
    return curves


def curves_of(points: Mapping[str, Points]) -> dict[str, Curve]:
    """Return the curves of a single model."""
    return {
        name: Curve(x=list(each), mean=list(each.values()), error=[0.0] * len(each), num_seeds=1)
        for name, each in points.items()
    }
